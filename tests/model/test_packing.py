"""Packed rows, chunked loss, checkpointed layers: faster ways to the numbers of the plain padded run."""

import importlib.util
import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GlmConfig, GlmForCausalLM, Qwen2Config, Qwen2ForCausalLM

from glm.config import Reward, Sft
from glm.data.encode import IGNORED
from glm.errors import InputError
from glm.models import methods, packed_attention
from glm.models.adapters import add_lora, last_hidden
from glm.models.chatglm1 import ChatGLMConfig, ChatGLMForCausalLM
from glm.models.packed_attention import VARLEN, attention_of, packed_implementation, why_not_packed
from glm.training import loss as loss_module
from glm.training import reward, sft
from glm.training.layers import MODES, decoder_layers, layers_run, memory_estimate
from glm.training.loss import cross_entropy_sum, label_positions
from glm.training.packing import Packing, pack_step, packed_row
from glm.training.plan import plan
from glm.training.reward import RankingCollator, RewardLoss, RewardModel
from glm.training.sft import SftCollator, SftLoss

VOCABULARY = 211
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
CHATGLM1 = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "inner_hidden_size": 64,
    "bos_token_id": 204, "eos_token_id": 205, "gmask_token_id": 201, "mask_token_id": 200, "pad_token_id": 3,
}  # fmt: skip
PACKING = Packing(tokens_per_row=64, multiple=16, max_sequences=8, max_length=40)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)).eval()
    return GlmForCausalLM(GlmConfig(**SIZES, **HEADS, head_dim=8, attention_bias=True)).eval()


def chatglm1() -> ChatGLMForCausalLM:
    torch.manual_seed(0)
    return ChatGLMForCausalLM(ChatGLMConfig(**CHATGLM1)).eval()


def adapted(name: str, **options: object) -> torch.nn.Module:
    base = chatglm1() if name == "chatglm1" else make(name)
    model = add_lora(base, Sft(lora_rank=4, lora_dropout=0.0, **options))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zero at the start: then no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def examples(count: int = 7) -> list[dict[str, list[int]]]:
    rng = random.Random(3)
    found = []
    for _ in range(count):
        ids = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(5, 40))]
        prompt = rng.randrange(1, len(ids) - 1)
        found.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    found[0]["labels"] = found[0]["input_ids"]  # a label on the first token, which nothing predicts
    return found


def step_loss(module: torch.nn.Module, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a step and the gradients, as the trainer makes them."""
    module.zero_grad()
    total = 0.0
    for part in batch["micro_batches"]:
        loss = module(**part) / batch["items"]
        loss.backward()
        total += loss.item()
    return total, {key: p.grad.clone() for key, p in module.named_parameters() if p.requires_grad}


def assert_same(found: tuple[float, dict], wanted: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        assert gradient.abs().max() > 1e-6, key
        torch.testing.assert_close(found[1][key], gradient, atol=1e-6, rtol=1e-4, msg=key)


def prefix_examples(count: int = 7) -> list[dict[str, list[int]]]:
    """`examples` as ChatGLM-6B has them: prompt [gMASK] <sop> answer."""
    found = []
    for example in examples(count + 1)[1:]:
        prompt = example["labels"].count(IGNORED)
        ids = [token % 200 for token in example["input_ids"]]
        ids = [*ids[:prompt], 201, 204, *ids[prompt:]]
        found.append({"input_ids": ids, "labels": [IGNORED] * (prompt + 2) + ids[prompt + 2 :]})
    return found


@pytest.mark.parametrize(("name", "wanted"), [("glm", "auto"), ("qwen2", "auto"), ("glm", "flex_attention")])
def test_packed_sft_is_the_padded_run(name: str, wanted: str) -> None:
    model, rows = adapted(name), examples()
    module = SftLoss(model)
    padded = step_loss(module, SftCollator(0, None, 3)(rows))
    collated = SftCollator(0, PACKING, 3)(rows)
    assert 1 < len(collated["micro_batches"]) < len(rows)
    base = model.get_base_model()
    with attention_of(base, packed_implementation(base, wanted)):
        assert_same(step_loss(module, collated), padded)
    # and that is transformers' own loss
    whole = SftCollator(0, None, len(rows))(rows)["micro_batches"][0]
    labels = torch.full_like(whole["input_ids"], IGNORED)
    for row, example in zip(labels, rows, strict=True):
        row[: len(example["labels"])] = torch.tensor(example["labels"])
    theirs = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"], labels=labels).loss
    assert padded[0] == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_prefix_lm_packs_too(stage: str) -> None:
    model, rows = adapted("chatglm1", lora_target=["query_key_value", "dense_h_to_4h"]), prefix_examples(9)
    packing = Packing(tokens_per_row=90, multiple=16, max_sequences=8, max_length=42, prefix_lm=model.config)
    if stage == "sft":
        module: torch.nn.Module = SftLoss(model)
        padded, packed = (SftCollator(3, kind, 9)(rows) for kind in (None, packing))
    else:
        module = RewardLoss(RewardModel(model, torch.nn.Linear(32, 1, bias=False)), Reward())
        sequences = [row["input_ids"] for row in rows]
        rankings = [{"sequences": sequences[:2]}, {"sequences": sequences[2:5]}, {"sequences": sequences[5:]}]
        padded, packed = (RankingCollator(3, kind, 3)(rankings) for kind in (None, packing))
    assert 1 < len(packed["micro_batches"]) < len(rows)
    wanted = step_loss(module, padded)
    with attention_of(model.get_base_model(), VARLEN):
        assert_same(step_loss(module, packed), wanted)


def test_flex_attention_reads_packed_rows_as_its_cpu_stand_in_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # eager: the block mask and flex attention itself, without generated code
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = make("glm")
    row = packed_row([example["input_ids"] for example in examples(4)], PACKING, 0)
    found = {}
    for name in (VARLEN, "sdpa", "flex_attention"):
        with torch.no_grad(), attention_of(model, name):
            found[name] = last_hidden(model, **row)
    for other in ("sdpa", "flex_attention"):
        torch.testing.assert_close(found[other], found[VARLEN], atol=1e-5, rtol=1e-5)


def test_packed_rankings_are_the_padded_run() -> None:
    model = adapted("glm")
    head = torch.nn.Linear(32, 1, bias=False)
    module = RewardLoss(RewardModel(model, head), Reward())
    sequences = [example["input_ids"] for example in examples(9)]
    rankings = [{"sequences": sequences[:2]}, {"sequences": sequences[2:5]}, {"sequences": sequences[5:7]}]
    rankings.append({"sequences": sequences[7:]})
    padded = step_loss(module, RankingCollator(0, None, 2)(rankings))
    packing = Packing(tokens_per_row=90, multiple=1, max_sequences=8, max_length=40)
    collated = RankingCollator(0, packing, 2)(rankings)
    assert 1 < len(collated["micro_batches"]) < 4
    with attention_of(model.get_base_model(), VARLEN):
        assert_same(step_loss(module, collated), padded)


@pytest.mark.parametrize("name", ["glm", "qwen2"])
def test_no_example_sees_another(name: str) -> None:
    model = make(name)
    sequences = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19]]

    def states(of: list[list[int]]) -> torch.Tensor:
        with torch.no_grad(), attention_of(model, VARLEN):
            return last_hidden(model, **packed_row(of, PACKING, 0))[0]

    before = states(sequences)
    for index, (start, end) in enumerate([(0, 5), (5, 8), (8, 15)]):
        changed = [list(sequence) for sequence in sequences]
        changed[index][0] = 99
        after = states(changed)
        same = torch.ones(len(before), dtype=torch.bool)
        same[start:end] = False
        assert torch.equal(after[same], before[same])
        assert (after[start:end] - before[start:end]).abs().amin(0).max() > 0
        alone = model.base_model(torch.tensor([sequences[index]])).last_hidden_state[0]
        torch.testing.assert_close(before[start:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained_head", [False, True])
def test_chunked_loss_is_the_plain_one(trained_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 50 * 40)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50)
    head.requires_grad_(trained_head)
    hidden = torch.randn(97, 16, requires_grad=True)
    targets = torch.randint(0, 50, (len(hidden),))
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(plain, [hidden, *(head.parameters() if trained_head else ())])
    chunked = cross_entropy_sum(hidden, head, targets, 50)
    found = torch.autograd.grad(chunked, [hidden, *(head.parameters() if trained_head else ())])
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_label_positions_predict_from_the_token_before() -> None:
    found = label_positions(torch.tensor([[7, IGNORED, 8, 9], [IGNORED, 5, IGNORED, IGNORED]]))
    assert found["positions"].tolist() == [1, 2, 4]
    assert found["targets"].tolist() == [8, 9, 5]


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_layers_give_the_same_gradients(mode: str) -> None:
    model = adapted("glm", lora_target="all-linear")
    module = SftLoss(model).train()
    batch = SftCollator(0, PACKING, 3)(examples())
    base = model.get_base_model()
    with attention_of(base, VARLEN):
        plain = step_loss(module, batch)
        with layers_run(base, compiled=False, checkpointing=mode):
            assert_same(step_loss(module, batch), plain)
        assert all("forward" not in vars(layer) for layer in decoder_layers(base))
    estimates = [memory_estimate(base, 4096, 1000, each, compiled=True) for each in MODES]
    assert estimates[0] > estimates[1] > estimates[2]


@pytest.mark.parametrize("mode", MODES)
def test_compiled_layers_share_code_and_give_the_same_gradients(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # aot_eager traces and differentiates as on a GPU, without the code generation that takes a compiler and a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted("glm")
    module = SftLoss(model).train()
    batches = [SftCollator(0, None, 4)(examples()[start : start + 4]) for start in (0, 3)]
    plain = [step_loss(module, batch) for batch in batches]
    with layers_run(model.get_base_model(), compiled=True, checkpointing=mode):
        for batch, wanted in zip(batches, plain, strict=True):
            assert_same(step_loss(module, batch), wanted)
    # three layers and two shapes: the first layer's input takes no gradient, the second shape makes sizes symbolic
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpointed_nf4_layer_keeps_its_input_alone(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = make("glm").bfloat16()
    for layer in decoder_layers(model):
        inner, width = layer.mlp.gate_up_proj.in_features, layer.mlp.gate_up_proj.out_features
        weight = bitsandbytes.nn.Params4bit(layer.mlp.gate_up_proj.weight.data, requires_grad=False, quant_type="nf4")
        layer.mlp.gate_up_proj = bitsandbytes.nn.Linear4bit(inner, width, bias=False, compute_dtype=torch.bfloat16)
        layer.mlp.gate_up_proj.weight = weight.to("cpu")
    module = SftLoss(add_lora(model, Sft(lora_rank=4, lora_dropout=0.0, lora_target=["query_key_value"]))).train()
    batch = SftCollator(0, None, 8)(examples())["micro_batches"][0]
    tokens = batch["input_ids"].numel()

    def kept(mode: str) -> int:
        sizes: list[int] = []
        with layers_run(model, compiled=compiled, checkpointing=mode):
            module(**batch)  # compiles
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
                loss = module(**batch)
            loss.backward()
        return sum(size for size in sizes if size >= tokens)

    assert kept("full") < 0.5 * kept("none")


def test_a_step_is_packed_in_decreasing_order() -> None:
    assert pack_step([1, 9, 8, 2], lambda size: size, 10) == [[9, 1], [8, 2]]


def test_a_row_keeps_its_shape() -> None:
    row = packed_row([[1, 2, 3], [4, 5]], PACKING, 0)
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 5] + [0] * 11]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, *range(11)]]
    assert row["cu_seq_lens_q"].tolist() == [0, 3, 5] + [16] * 7
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert len(packed_row([[1] * 16], PACKING, 0)["cu_seq_lens_q"]) == 10


def test_the_plan_keeps_the_number_of_examples_unless_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="glm")
    model, rows = adapted("glm"), examples(20)
    sequences = lambda example: [example["input_ids"]]  # noqa: E731
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "tokens_per_forward": 64}
    found = plan(model, rows, sequences, Sft(**options), stage="sft", seed=0)
    assert found.train_set is rows and found.step_size == 8 and found.packing and not found.compiled
    found = plan(model, rows, sequences, Sft(**options, tokens_per_step=128), stage="sft", seed=0)
    assert found.step_size == 2 and all(isinstance(row, list) for row in found.train_set)
    assert f"{-(-len(found.train_set) // 2)} steps an epoch of 2 rows, about " in caplog.text
    found = plan(model, rows, sequences, Sft(**options, packing=False), stage="sft", seed=0)
    assert found.packing is None and found.step_size == 8
    assert "3 steps an epoch of 8 examples" in caplog.text


@pytest.mark.parametrize("tokens_per_step", [None, 128])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_training_runs_and_packing_changes_nothing(stage: str, tokens_per_step: int | None) -> None:
    rows = examples(24)
    if stage == "reward":
        rows = [{"sequences": [a["input_ids"], b["input_ids"]]} for a, b in zip(rows[::2], rows[1::2], strict=True)]
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    lora = Sft(lora_rank=4, lora_dropout=0.0)
    losses: dict[bool, list[float]] = {}
    for packing in (True, False):
        tokens = {"tokens_per_step": tokens_per_step} if packing else {}
        changes = {**options, "packing": packing, "per_device_eval_batch_size": 20, **tokens}
        points: dict[int, dict[str, float]] = {}
        speeds: list[dict[str, float]] = []
        calls = {
            "seed": 0,
            "log": lambda step, values, to=points: to.setdefault(step, {}).update(values),
            "log_speed": lambda step, values, to=speeds: to.append(values),
            "progress": lambda done, total: None,
        }
        model, tokenizer = make("glm"), SimpleNamespace(pad_token_id=0)
        if stage == "sft":
            params = Sft.model_validate({**lora.model_dump(), **changes})
            _, numbers = sft.train(model, tokenizer, rows, rows, params, **calls)
        else:
            params = Reward.model_validate(changes)
            _, numbers = reward.train(model, tokenizer, rows, rows, params, shape=lora, **calls)
        assert numbers["steps"] == 3 and model.config._attn_implementation == "sdpa"
        assert speeds and all(values["tokens_per_second"] > 0 for values in speeds)
        losses[packing] = [points[step]["loss"] for step in (1, 2, 3)]
    assert losses[True][2] != pytest.approx(losses[True][0], abs=1e-3)  # it does learn
    if tokens_per_step is None:
        assert losses[True] == pytest.approx(losses[False], abs=1e-4)


def test_what_processes_share_out_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of method full under FSDP and ZeRO, a process holds its share of weights, gradients and moments."""
    model, rows = methods.start(make("glm"), "full", Sft()), examples()
    calls = {"stage": "sft", "seed": 0}
    alone = plan(model, rows, lambda example: [example["input_ids"]], Sft(method="full"), **calls, strategy="fsdp")
    assert (alone.strategy, alone.holders) == ("ddp", 1)
    monkeypatch.setattr("glm.training.plan.world_size", lambda: 4)
    for strategy, method, holders in (("ddp", "full", 1), ("fsdp", "full", 4), ("deepspeed_zero3", "lora", 1)):
        params = Sft(method=method)
        found = plan(model, rows, lambda example: [example["input_ids"]], params, **calls, strategy=strategy)
        assert (found.strategy, found.holders) == (strategy if holders > 1 else "ddp", holders)


def test_a_prefix_lm_trains_packed_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, rows = adapted("chatglm1", lora_target=["query_key_value"]), prefix_examples()
    with caplog.at_level("INFO", logger="glm"):
        found = plan(model, rows, lambda example: [example["input_ids"]], Sft(), stage="sft", seed=0)
    assert found.packing and found.packing.prefix_lm is model.config and "packed" in caplog.text
    flex = Sft(attn_implementation="flex_attention")
    with caplog.at_level("INFO", logger="glm"):
        found = plan(model, rows, lambda example: [example["input_ids"]], flex, stage="sft", seed=0)
    assert found.packing is None and found.attention is None
    assert "padded (ChatGLM-6B sees its prompt in both directions" in caplog.text


def test_what_cannot_be_packed_stays_padded_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    windowed = Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model = add_lora(Qwen2ForCausalLM(windowed), Sft())
    with caplog.at_level("INFO", logger="glm"):
        found = plan(model, examples(), lambda example: [example["input_ids"]], Sft(), stage="sft", seed=0)
    assert found.packing is None
    assert "padded (Qwen2ForCausalLM has layers of sliding_attention)" in caplog.text
    with pytest.raises(InputError, match=r"sft\.tokens_per_step 512 needs packed rows: Qwen2ForCausalLM"):
        plan(model, examples(), lambda e: [e["input_ids"]], Sft(tokens_per_step=512), stage="sft", seed=0)
    dropping = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, attention_dropout=0.1))
    assert "attention_dropout 0.1" in (why_not_packed(dropping) or "")


def test_flash_attention_needs_its_package() -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(InputError, match="attn_implementation: flash_attention_2 needs the package flash-attn"):
        packed_implementation(make("glm"), "flash_attention_2")


def test_full_training_in_half_precision_reaches_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    # its weights are float32 under autocast; flash attention wants all three in the half type
    found = set()
    one_by_one = packed_attention._one_by_one

    def note(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        found.update({query.dtype, key.dtype, value.dtype})
        return one_by_one(query, key, value, *args, **options)

    monkeypatch.setattr(packed_attention, "_one_by_one", note)
    model = make("glm").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    tuned = methods.start(model, "full", Sft(method="full"), None)
    row = packed_row([example["input_ids"] for example in examples(2)], PACKING, 0)
    with attention_of(model, VARLEN):
        last_hidden(tuned, **row).float().sum().backward()
    assert found == {torch.bfloat16} and model.dtype == torch.float32
