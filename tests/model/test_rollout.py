"""The rollout's decoder against transformers' generate and the model's own forward pass."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GlmConfig, GlmForCausalLM

from glm.generation import decode_step
from glm.generation.decode import generate
from glm.generation.rollout import Decoder
from glm.models import load_model, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = load_tokenizer(GOLDEN / "tokenizer-chatglm2-tiny")  # only its end and padding tokens count here
NEW_TOKENS = 40


def tiny(**shape) -> GlmForCausalLM:
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,  # so that heads x size differ from hidden_size
        "attention_bias": True,
        "pad_token_id": TOKENIZER.pad_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    model = GlmForCausalLM(GlmConfig(**settings | shape)).eval()
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] *= 2  # some answers shall end early
    return model


def lora(seed: int = 1, **settings) -> LoraConfig:
    torch.manual_seed(seed)
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    )


def prompts(sizes=(5, 9, 1, 70, 17, 3, 4, 8)) -> list[list[int]]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(3, 97, (size,), generator=draw).tolist() for size in sizes]


def greedy(model) -> list[list[int]]:
    return generate(model, TOKENIZER, prompts(), max_new_tokens=NEW_TOKENS, batch_size=5)


def ours(decoder: Decoder, **options):
    return decoder.sample(prompts(), TOKENIZER, **{"max_new_tokens": NEW_TOKENS, "batch_size": 5} | options)


def forward_logprobs(model, prompt: list[int], answer: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "attention_bias": False},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
)
def test_greedy_tokens_are_those_of_generate(shape) -> None:
    model = tiny(**shape)
    wanted = greedy(model)
    assert ours(Decoder(model)).answers == wanted
    lengths = {len(answer) for answer in wanted}
    assert min(lengths) < NEW_TOKENS  # else ends are not tested


def test_it_follows_the_active_adapter_and_its_training() -> None:
    model = get_peft_model(tiny(), lora(1), adapter_name="policy")
    model.add_adapter("other", lora(2, r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    model.eval()
    decoder = Decoder(model)
    answers = {}
    for adapter in ("policy", "other", "policy"):
        model.set_adapter(adapter)
        answers[adapter] = ours(decoder).answers
        assert answers[adapter] == greedy(model)
    with model.disable_adapter():
        answers["base"] = ours(decoder).answers
        assert answers["base"] == greedy(model)
    assert len({str(found) for found in answers.values()}) == 3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.policy" in name:
                parameter.mul_(-1)
    assert ours(decoder).answers == greedy(model) != answers["policy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_leaves_the_model_bit_for_bit_as_it_was(dtype) -> None:
    model = get_peft_model(tiny().to(dtype), lora(), adapter_name="policy").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = Decoder(model)
    for _ in range(3):
        ours(decoder, do_sample=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_log_probabilities_and_values_are_those_of_the_forward_pass() -> None:
    model = get_peft_model(tiny(), lora()).eval()
    torch.manual_seed(3)
    head = nn.Linear(32, 1, bias=False)
    found = ours(Decoder(model), do_sample=True, temperature=1.7, value_head=head)
    lengths = [len(answer) for answer in found.answers]
    assert min(lengths) < max(lengths) == found.logprobs.shape[1]
    for row, (prompt, answer) in enumerate(zip(prompts(), found.answers, strict=True)):
        size = len(answer)
        torch.testing.assert_close(
            found.logprobs[row, :size], forward_logprobs(model, prompt, answer, 1.7), atol=5e-5, rtol=0
        )
        with torch.no_grad():
            hidden = model.get_base_model().model(torch.tensor([prompt + answer])).last_hidden_state
            values = head(hidden[0, len(prompt) - 1 : -1]).squeeze(-1)
        torch.testing.assert_close(found.values[row, :size], values, atol=5e-5, rtol=0)
        assert (found.logprobs[row, size:] == 0).all() and (found.values[row, size:] == 0).all()


def test_in_bfloat16_the_log_probabilities_are_as_near_to_float32_as_the_forward_pass_is() -> None:
    exact = get_peft_model(tiny(initializer_range=0.15), lora())
    model = get_peft_model(tiny(initializer_range=0.15), lora()).to(torch.bfloat16).eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    exact.eval()
    found = ours(Decoder(model), do_sample=True)
    rollout, forward = [], []
    for row, (prompt, answer) in enumerate(zip(prompts(), found.answers, strict=True)):
        true = forward_logprobs(exact, prompt, answer)
        rollout.append(found.logprobs[row, : len(answer)] - true)
        forward.append(forward_logprobs(model, prompt, answer) - true)
    rollout_error, forward_error = torch.cat(rollout).abs().mean(), torch.cat(forward).abs().mean()
    assert rollout_error < 1.5 * forward_error


def test_samples_have_the_model_s_distribution() -> None:
    model = tiny(initializer_range=0.15)
    prompt = prompts()[0]
    torch.manual_seed(4)
    draws = 20000
    settings = {"max_new_tokens": 1, "batch_size": 5000, "do_sample": True, "temperature": 1.5}
    found = Decoder(model).sample([prompt] * draws, TOKENIZER, **settings)
    counts = torch.bincount(torch.tensor([answer[0] for answer in found.answers]), minlength=97).float()
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1) * draws
    frequent = expected > 20
    chi_square = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum().item()
    freedom = int(frequent.sum())
    assert freedom > 20 and chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_samples_repeat_with_the_seed() -> None:
    decoder = Decoder(tiny())
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(ours(decoder, do_sample=True).answers)
    assert drawn[0] == drawn[1] != drawn[2]


def test_models_that_the_step_does_not_cover_are_refused() -> None:
    assert decode_step.supports(tiny())
    assert not decode_step.supports(load_model(GOLDEN / "chatglm1-tiny"))
    assert not decode_step.supports(load_model(GOLDEN / "chatglm2-tiny", quantization="cpm-int8"))
    prefix = GOLDEN / "chatglm2-tiny-ptuning"
    assert not decode_step.supports(load_model(prefix, adapters=[prefix / "prefix_encoder.safetensors"]))
    assert not decode_step.supports(get_peft_model(tiny(), lora(use_dora=True)).get_base_model())
    with pytest.raises(ValueError, match="cannot be decoded"):
        Decoder(load_model(GOLDEN / "chatglm1-tiny"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_give_the_same_tokens_while_rows_leave() -> None:
    model = get_peft_model(tiny(head_dim=16, hidden_size=64), lora()).eval().cuda()
    many = prompts([*range(1, 33), 40, 5, 7])
    settings = {"max_new_tokens": 60, "batch_size": 32}
    decoder = Decoder(model)
    for _ in range(2):
        assert decoder.sample(many, TOKENIZER, **settings).answers == generate(model, TOKENIZER, many, **settings)
    assert len(decoder.graphs) > 1
