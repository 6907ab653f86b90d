"""ChatGLM-6B: positions, masks, decoding and heads. Parity with the original is in test_parity.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from glm.models import load_model
from glm.models.chatglm1 import (
    ChatGLMConfig,
    ChatGLMForCausalLM,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
    prefix_lm_positions,
    rotary_cos_sin,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MASK, GMASK, BOS, PAD = 500, 501, 504, 3
PROMPT = [11, 12, 13, 14, GMASK, BOS]
CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "chatglm1-tiny", dtype=torch.float32)


@pytest.fixture
def batch():
    """Two prompts of different length with the start of an answer, padded on the left."""
    rows = [[*PROMPT, 21, 22], [31, 32, *PROMPT[:2], 33, *PROMPT[2:], 23, 24]]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.mark.parametrize(
    ("ids", "mask", "first", "second"),
    [
        ([7, 8, GMASK, BOS, 9, 10], None, [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        ([7, MASK, 8, BOS, 9, 10], None, [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([MASK, 7, GMASK, BOS, 9, 10], None, [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        ([7, GMASK, BOS, 9, GMASK, BOS], None, [0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]),  # only the first ones count
        ([PAD, PAD, 7, GMASK, BOS, 9], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 2]),
        ([7, MASK, BOS, GMASK, 9, 10], None, [0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]),  # a [gMASK] of the answer
    ],
)
def test_positions(model, ids, mask, first, second):
    mask = None if mask is None else torch.tensor([mask])
    assert prefix_lm_positions(model.config, torch.tensor([ids]), mask).tolist() == [[first, second]]


@pytest.mark.parametrize("ids", [[7, 8, GMASK, 9], [7, 8, BOS, GMASK]])
def test_a_sequence_that_is_none_of_chatglm6b_is_refused(model, ids):
    with pytest.raises(ValueError, match="row 1 has no"):
        model(torch.tensor([PROMPT[-4:], ids]))


def test_rotary_tables_are_the_original_ones():
    golden = load_file(GOLDEN / "chatglm1-tiny" / "expected.safetensors")
    positions = golden["rope.positions"].long()
    both = torch.stack([positions, positions])[None]
    width = golden["rope.cos_fp32"].shape[-1]
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16")):
        cos, sin = rotary_cos_sin(both, 2 * width, dtype)
        for half in (slice(0, width), slice(width, None)):
            torch.testing.assert_close(cos[0, 0, :, half], golden[f"rope.cos_{name}"], atol=1e-6, rtol=0)
            torch.testing.assert_close(sin[0, 0, :, half], golden[f"rope.sin_{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_changes_nothing(attention):
    model = load_model(GOLDEN / "chatglm1-tiny", dtype=torch.float32, attn_implementation=attention)
    row = torch.tensor([[*PROMPT, 21, 22, 23]])
    pads, ones = torch.full((1, 4), PAD), torch.ones_like(row)
    with torch.no_grad():
        plain = model(row).logits
        left = model(torch.cat([pads, row], 1), attention_mask=torch.cat([pads * 0, ones], 1)).logits[:, 4:]
        right = model(torch.cat([row, pads], 1), attention_mask=torch.cat([ones, pads * 0], 1)).logits[:, :-4]
    torch.testing.assert_close(left, plain, **CLOSE)
    torch.testing.assert_close(right, plain, **CLOSE)


def test_the_prompt_sees_itself_whole_and_the_answer_only_its_past(model):
    ids = torch.tensor([[*PROMPT, 21, 22, 23]])
    changed_prompt, changed_answer = ids.clone(), ids.clone()
    changed_prompt[0, 3], changed_answer[0, -1] = 99, 99
    with torch.no_grad():
        plain, prompt, answer = (model(x).logits[0] for x in (ids, changed_prompt, changed_answer))
    assert (plain[0] - prompt[0]).abs().max() > 1e-2  # the first token sees the fourth
    torch.testing.assert_close(plain[:-1], answer[:-1], **CLOSE)


def test_going_on_from_a_cache_without_positions(model, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        whole = model(**batch).logits
        start = model(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
        one = model(ids[:, -2:-1], attention_mask=mask[:, :-1], past_key_values=start.past_key_values)
        two = model(ids[:, -1:], attention_mask=mask, past_key_values=one.past_key_values)
    torch.testing.assert_close(torch.cat([one.logits, two.logits], 1), whole[:, -2:], **CLOSE)


def test_given_positions_stand_in_for_token_ids(model, batch):
    positions = prefix_lm_positions(model.config, **batch)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        got = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions).logits
        torch.testing.assert_close(got, model(**batch).logits, **CLOSE)
        with pytest.raises(ValueError, match="needs position_ids"):
            model(inputs_embeds=embeds)


@pytest.mark.parametrize(
    "other",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3, "compare": {"num_beams": 3, "use_cache": False}},
    ],
    ids=["no cache", "static cache", "beam search"],
)
def test_decoding_strategies_agree(model, batch, other):
    prompt = {name: value[:, :-2] for name, value in batch.items()}
    compare = other.pop("compare", {})
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings, **other), model.generate(**prompt, **settings, **compare))


def test_generation_is_the_same_alone_and_in_a_batch(model, batch):
    prompt = {name: value[:, :-2] for name, value in batch.items()}
    together = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    pads = int((prompt["attention_mask"][0] == 0).sum())
    alone = model.generate(prompt["input_ids"][:1, pads:], max_new_tokens=8, do_sample=False)[0]
    assert together[pads : pads + len(alone)].tolist() == alone.tolist()
    assert model.generate(**prompt, max_new_tokens=4, do_sample=True, num_return_sequences=3).shape[0] == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(batch, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = load_model(GOLDEN / "chatglm1-tiny", dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_classification_scores_the_last_token_whatever_the_padding():
    model = load_model(GOLDEN / "chatglm1-tiny", dtype=torch.float32, task="sequence_classification")
    assert isinstance(model, ChatGLMForSequenceClassification)
    row = torch.tensor([[*PROMPT, 21, 22]])
    pads, ones = torch.full((1, 3), PAD), torch.ones_like(row)
    with torch.no_grad():
        plain = model(row).logits
        left = model(torch.cat([pads, row], 1), attention_mask=torch.cat([pads * 0, ones], 1)).logits
        right = model(torch.cat([row, pads], 1), attention_mask=torch.cat([ones, pads * 0], 1)).logits
    assert plain.shape == (1, 1)
    torch.testing.assert_close(left, plain, **CLOSE)
    torch.testing.assert_close(right, plain, **CLOSE)


def test_registered_with_the_auto_classes(model, tmp_path):
    folder = GOLDEN / "chatglm1-tiny"
    assert isinstance(AutoConfig.from_pretrained(folder), ChatGLMConfig)
    assert isinstance(AutoModel.from_pretrained(folder), ChatGLMModel)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(folder), ChatGLMForSequenceClassification)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ChatGLMForCausalLM)
    assert again.lm_head.weight is again.transformer.word_embeddings.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert set(load_file(tmp_path / "model.safetensors")) <= set(load_file(folder / "model.safetensors"))


def test_a_later_generation_is_not_taken_for_the_first():
    with pytest.raises(ValueError, match="padded_vocab_size belongs to"):
        AutoModelForCausalLM.from_pretrained(GOLDEN / "chatglm2-tiny")


def test_the_earlier_vocabulary_with_image_tokens(tmp_path):
    """150528 rows, all special ids 20000 higher, and a config.json that names only bos and eos."""
    config = json.loads((GOLDEN / "chatglm1-tiny" / "config.json").read_text())
    config |= {"vocab_size": 150528, "hidden_size": 16, "inner_hidden_size": 32, "num_layers": 1}
    config |= {"bos_token_id": 150004, "eos_token_id": 150005}
    del config["mask_token_id"], config["gmask_token_id"], config["pad_token_id"]
    ChatGLMForCausalLM(ChatGLMConfig.from_dict(dict(config))).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    named = (model.config.mask_token_id, model.config.gmask_token_id, model.config.pad_token_id)
    assert named == (150000, 150001, 20003)
    ids = torch.tensor([[20011, 20012, 150001, 150004, 20021]])
    assert model(ids).logits.shape == (1, 5, 150528)
    assert prefix_lm_positions(model.config, ids)[0, 0].tolist() == [0, 1, 2, 2, 2]
