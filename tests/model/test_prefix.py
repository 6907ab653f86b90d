"""P-Tuning v2. Parity with the original's prefix encoders is in test_parity.py."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from glm.errors import InputError
from glm.models import load_model
from glm.models.prefix import new_prefix
from glm.models.saving import save_prefix_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE = {"atol": 2e-5, "rtol": 0}


def make(name, attention="sdpa"):
    if name != "qwen2":
        return load_model(GOLDEN / name, dtype=torch.float32, attn_implementation=attention)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, pad_token_id=0, attn_implementation=attention)).eval()


@pytest.fixture
def batch():
    rows = [[11, 12, 13, 14, 501, 504, 21, 22], [31, 32, 33, 12, 34, 35, 501, 504, 23, 24]]
    ids = torch.tensor([[0, 0, *rows[0]], rows[1]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def gradients(name, projection, batch, checkpointing):
    """Gradients of the prefix, and whether any weight of the base got one. `checkpointing`: None or its options."""
    torch.manual_seed(1)
    model = make(name)
    encoder = new_prefix(model, num_virtual_tokens=5, projection=projection)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        if checkpointing["use_reentrant"]:
            model.enable_input_require_grads()
    torch.manual_seed(2)  # of the prefix's dropout
    model(**batch, labels=batch["input_ids"]).loss.backward()
    base = [p for key, p in model.named_parameters() if "prefix_encoder" not in key]
    assert not any(p.requires_grad or p.grad is not None for p in base)
    return {key: p.grad for key, p in encoder.named_parameters()}


@pytest.mark.parametrize("name", ["chatglm1-tiny", "chatglm2-tiny", "qwen2"])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_prefix_its_whole_gradient(name, projection, reentrant, batch):
    plain = gradients(name, projection, batch, None)
    checkpointed = gradients(name, projection, batch, {"use_reentrant": reentrant})
    assert checkpointed.keys() == plain.keys() and len(plain) == (5 if projection else 1)
    for key, gradient in plain.items():
        assert gradient.abs().max() > 1e-6, key
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-7, rtol=1e-4)
    if not projection:  # every layer's keys and values are learned
        assert (plain["embedding.weight"].view(5, 4, -1).abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize("name", ["chatglm1-tiny", "chatglm2-tiny", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_with_a_prefix(name, attention, batch):
    model = make(name, attention)
    plain = model(**batch).logits
    new_prefix(model, num_virtual_tokens=5, projection=True)
    model.eval()
    with torch.no_grad():
        assert (model(**batch).logits - plain)[batch["attention_mask"].bool()].abs().max() > 1e-2
        # Left padding shifts nothing, though positions are not given.
        alone = model(batch["input_ids"][:1, 2:]).logits
        torch.testing.assert_close(model(**batch).logits[:1, 2:], alone, **CLOSE)
    prompt = {key: value[:, :-2] for key, value in batch.items()}
    settings = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(**prompt, **settings)
    assert torch.equal(cached, model.generate(**prompt, **settings, use_cache=False))
    beams = model.generate(**prompt, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**prompt, **settings, num_beams=3, use_cache=False))


@pytest.mark.parametrize("name", ["chatglm1-tiny", "chatglm2-tiny"])
@pytest.mark.parametrize("projection", [False, True])
def test_training_then_saving_then_loading(name, projection, batch, tmp_path):
    model = make(name)
    encoder = new_prefix(model, num_virtual_tokens=5, projection=projection)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-2)
    model.train()
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    save_prefix_adapter(model, tmp_path / "prefix")
    assert model.base_model.prefix_encoder is encoder
    again = load_model(GOLDEN / name, adapters=[tmp_path / "prefix"], dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert sorted(path.name for path in (tmp_path / "prefix").iterdir()) == [
        "prefix_config.json",
        "prefix_encoder.safetensors",
    ]


def test_a_changed_prefix_is_seen_after_an_evaluation(batch):
    model = make("chatglm2-tiny")
    encoder = new_prefix(model, num_virtual_tokens=5, projection=True)
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        encoder.trans[2].bias.add_(0.5)
        assert (model(**batch).logits - before).abs().max() > 1e-3


def test_a_prefix_of_another_model_is_refused():
    prefix = GOLDEN / "chatglm1-tiny-ptuning" / "prefix_encoder.safetensors"
    with pytest.raises(InputError, match=r"safetensors: the prefix is 256 wide, but this model needs 128"):
        load_model(GOLDEN / "chatglm2-tiny", adapters=[prefix])
    with pytest.raises(InputError, match="holds no prefix encoder"):
        load_model(GOLDEN / "chatglm2-tiny", adapters=[GOLDEN / "chatglm2-tiny" / "model.safetensors"])
