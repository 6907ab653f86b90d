"""Every method on every kind of weights and generation: it learns, changes what it should, and comes back from disk."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glm.config import EmbeddedModel, Reward, Sft
from glm.errors import InputError
from glm.files import read_jsonl, write_jsonl
from glm.models import embedded, load_model, load_tokenizer, methods
from glm.models.adapters import active_loras, causal_lm, plain_name
from glm.models.lineage import Lineage, above, read_lineage
from glm.models.saving import as_trained, probe_outputs, save_merged, save_trained
from glm.training import reward, sft
from glm.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOKENIZER = load_tokenizer(GOLDEN / "tokenizer-chatglm2-tiny")
RATES = {"lora": 2e-2, "p_tuning": 1e-1, "freeze": 1e-2, "full": 1e-2}
MADE_FOR = {"chatglm1": "chatglm1-tiny", "glm": "chatglm2-tiny"}


def shape(method: str, **values: Any) -> Sft:
    settings = {
        "method": method,
        "learning_rate": RATES[method],
        "lora_rank": 4,
        "lora_dropout": 0.0,
        "pre_seq_len": 4,
        "num_layer_trainable": 1,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "tokens_per_forward": 64,
    }
    return Sft.model_validate(settings | values)


def rows(model: Any, number: int = 8) -> list[dict[str, Any]]:
    """Sequences of one repeated token after a prompt, which any method can learn to say."""
    config = model.config
    special = [config.gmask_token_id, config.bos_token_id] if config.model_type == "chatglm" else []
    found = []
    for row in range(number):
        ids = [5 + row, 6 + row, 7 + row, *special, 11, 11, 11, 12]
        found.append({"input_ids": ids, "labels": [-100] * (len(ids) - 4) + ids[-4:]})
    return found


def nothing(*_: Any) -> None:
    """A log or progress that keeps nothing."""


def train(model: Any, params: Sft, **options: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(3)
    losses: list[float] = []

    def log(step: int, values: dict[str, float]) -> None:
        losses.extend([values["loss"]] if "loss" in values else [])

    calls = {"seed": 1, "log": log, "log_speed": nothing, "progress": nothing}
    tuned, _ = sft.train(model, TOKENIZER, rows(model), [], params, **calls, **options)
    return tuned.eval(), losses


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another causal language model, its embeddings tied."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder)
    return folder


def base_of(generation: str, llama: Path) -> str:
    return str(llama if generation == "llama" else GOLDEN / MADE_FOR[generation])


CELLS = [
    (method, quantization, generation)
    for generation in ("chatglm1", "glm", "llama")
    for method in ("lora", "p_tuning", "freeze", "full")
    for quantization in ("none", "nf4", "int8", "cpm-int4", "cpm-int8")
    if not (quantization != "none" and method in ("freeze", "full"))  # refused, see tests/code/test_config.py
    if not (quantization.startswith("cpm") and generation == "llama")  # refused by load_model
    if not (generation != "glm" and quantization in ("int8", "cpm-int8"))  # as their 4-bit kin
]


@pytest.mark.parametrize(("method", "quantization", "generation"), CELLS)
def test_a_cell_learns_and_comes_back(
    method: str, quantization: str, generation: str, llama: Path, tmp_path: Path
) -> None:
    below = Lineage(base=base_of(generation, llama), dtype="float32", quantization=quantization)
    options = {"dtype": "float32", "quantization": quantization}
    model = load_model(below.base, **options)
    before = {plain_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    tuned, losses = train(model, shape(method))
    assert losses[-1] < 0.9 * losses[0]

    after = {plain_name(name): tensor for name, tensor in causal_lm(tuned).state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if method in ("lora", "p_tuning"):
        assert not changed
    elif method == "freeze":
        assert changed and all(".layers.1.mlp." in name for name in changed)
    else:
        assert len(changed) > 0.8 * len(before)

    save_trained(tuned, method, tmp_path / "sft", below, tokenizer=TOKENIZER)
    loaded = load_model(tmp_path / "sft")
    wanted = probe_outputs(tuned)
    torch.testing.assert_close(probe_outputs(loaded), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(probe_outputs(as_trained(tmp_path / "sft")), wanted, atol=1e-4, rtol=1e-4)
    files = {path.name for path in (tmp_path / "sft").iterdir()}
    assert "stands_on.json" in files and ("model.safetensors" in files) == (method == "full")


@pytest.mark.parametrize("quantization", ["none", "nf4", "cpm-int4"])
@pytest.mark.parametrize("method", ["lora", "p_tuning", "freeze", "full"])
def test_an_export_answers_as_what_was_trained(method: str, quantization: str, tmp_path: Path) -> None:
    if quantization != "none" and method in ("freeze", "full"):
        return
    below = Lineage(base=str(GOLDEN / "chatglm2-tiny"), dtype="float32", quantization=quantization)
    tuned, _ = train(load_model(below.base, dtype="float32", quantization=quantization), shape(method, max_steps=3))
    save_trained(tuned, method, tmp_path / "sft", below)
    whole = load_model(tmp_path / "sft", dequantize=True)
    save_merged(whole, TOKENIZER, tmp_path / "export", prefix_beside=True)
    exported = probe_outputs(load_model(tmp_path / "export"))
    torch.testing.assert_close(exported, probe_outputs(tuned), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa", "learning_rate": 2e-3},
        {"init_lora_weights": "pissa", "use_rslora": True, "learning_rate": 2e-3},
        {"loraplus_lr_ratio": 4.0, "learning_rate": 5e-3},
        {"neftune_noise_alpha": 5.0},
        {"optim": "adafactor"},
        {"lora_target": ["query_key_value"]},
    ],
)
def test_kinds_of_lora(values: dict[str, Any], tmp_path: Path) -> None:
    below = Lineage(base=str(GOLDEN / "chatglm2-tiny"), dtype="float32")
    tuned, losses = train(load_model(below.base, dtype="float32"), shape("lora", **values))
    assert losses[-1] < losses[0]
    save_trained(tuned, "lora", tmp_path / "sft", below)
    torch.testing.assert_close(probe_outputs(load_model(tmp_path / "sft")), probe_outputs(tuned), atol=1e-3, rtol=1e-3)


def test_freeze_takes_exactly_what_it_is_told() -> None:
    """Layer 1 is not layer 11, and qkv is found in every generation."""
    sizes = EmbeddedModel(
        hidden_size=16, num_layers=12, num_attention_heads=2, multi_query_group_num=1, ffn_hidden_size=16
    )
    deep = embedded.new_model(sizes, load_tokenizer(GOLDEN / "chatglm2-e2e"))

    def layers(number: int, part: str) -> set[str]:
        return {name.removeprefix("model.layers.") for name in methods.chosen_weights(deep, choice(number, part))}

    def choice(number: int, part: str) -> Sft:
        return shape("freeze", num_layer_trainable=number, name_module_trainable=part)

    assert layers(-2, "mlp") == {f"{n}.mlp.{part}.weight" for n in (0, 1) for part in ("gate_up_proj", "down_proj")}
    kinds = ("weight", "bias") if deep.config.attention_bias else ("weight",)
    assert layers(1, "qkv") == {f"11.self_attn.{part}_proj.{kind}" for part in "qkv" for kind in kinds}
    first = load_model(GOLDEN / "chatglm1-tiny")
    assert all("query_key_value" in name for name in methods.chosen_weights(first, choice(1, "qkv")))
    with pytest.raises(InputError, match="num_layer_trainable: 13, but GlmForCausalLM has 12 layers"):
        layers(13, "mlp")


@pytest.mark.parametrize(
    ("quantization", "sft_method", "reward_method", "resume"),
    [
        ("none", "lora", "lora", True),
        ("none", "lora", "lora", False),
        ("none", "full", "lora", True),
        ("none", "freeze", "lora", True),
        ("none", "lora", "freeze", True),
        ("none", "p_tuning", "p_tuning", True),
        ("none", "p_tuning", "lora", True),
        ("none", "lora", "full", True),
        ("nf4", "lora", "lora", False),
        ("cpm-int4", "p_tuning", "lora", True),
    ],
)
def test_a_reward_model_on_what_sft_trained(
    quantization: str, sft_method: str, reward_method: str, resume: bool, tmp_path: Path
) -> None:
    below = Lineage(base=str(GOLDEN / "chatglm2-tiny"), dtype="float32", quantization=quantization)
    tuned, _ = train(load_model(below.base, dtype="float32", quantization=quantization), shape(sft_method, max_steps=2))
    save_trained(tuned, sft_method, tmp_path / "sft", below)
    below, start = above(tmp_path / "sft").starting(reward_method, resume=resume)
    below.check(reward_method)
    assert (start is not None) == (sft_method == reward_method and resume)
    model = load_model(below.base, adapters=below.adapters, dtype="float32", quantization=below.quantization)
    params = Reward(method=reward_method, learning_rate=RATES[reward_method] / 4, max_steps=8, logging_steps=2)
    examples = [{"sequences": [row["input_ids"], [*row["input_ids"][:-3], 13, 14]]} for row in rows(model)]
    calls = {"shape": shape("lora"), "seed": 1, "log": nothing, "log_speed": nothing, "progress": nothing}
    trained, numbers = reward.train(model, TOKENIZER, examples, examples, params, start=start, **calls)
    assert numbers["pairwise_loss"] < 0.65
    if reward_method == "full":  # of the vocabulary head, scores know nothing: it is saved, but not trained
        head = trained.backbone.get_output_embeddings().weight
        assert numbers["trainable_parameters"] == sum(map(torch.numel, trained.parameters())) - head.numel()
        assert torch.equal(head, load_model(tmp_path / "sft").get_output_embeddings().weight)
    save_trained(trained.backbone, reward_method, tmp_path / "reward", below, score=trained.score)

    sequences = [sequence for example in examples for sequence in example["sequences"]]
    if reward_method == "full":
        again = reward.load(load_model(tmp_path / "reward"), tmp_path / "reward")
        assert torch.equal(again.backbone.get_output_embeddings().weight, head)
    else:
        found = read_lineage(tmp_path / "reward")[1]
        stack = load_model(found.base, adapters=found.adapters, dtype="float32", quantization=found.quantization)
        again = reward.load(stack, tmp_path / "reward")
    wanted = reward.scores_of(trained.eval(), sequences, 0, 4)
    torch.testing.assert_close(reward.scores_of(again, sequences, 0, 4), wanted, atol=1e-4, rtol=1e-4)


def test_a_changed_or_missing_part_beneath_is_one_error(tmp_path: Path) -> None:
    base = Lineage(base=str(GOLDEN / "chatglm2-tiny"), dtype="float32")
    tuned, _ = train(load_model(base.base, dtype="float32"), shape("lora", max_steps=1))
    save_trained(tuned, "lora", tmp_path / "sft", base)
    tuned, _ = train(load_model(tmp_path / "sft"), shape("lora", max_steps=1))
    save_trained(tuned, "lora", tmp_path / "top", above(tmp_path / "sft"))
    load_model(tmp_path / "top")
    (tmp_path / "sft" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="sft, which this was trained on, is no longer what it was"):
        load_model(tmp_path / "top")
    (tmp_path / "sft").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="sft, which this was trained on, is missing"):
        load_model(tmp_path / "top")


def test_several_adapters_are_stacked_on_a_quantised_base(tmp_path: Path) -> None:
    below = Lineage(base=str(GOLDEN / "chatglm2-tiny"), dtype="float32", quantization="nf4")
    for name in ("one", "two", "three"):
        model = load_model(below.base, adapters=below.adapters, dtype="float32", quantization="nf4")
        assert len(active_loras(model)) == len(below.adapters)
        tuned, _ = train(model, shape("lora", max_steps=2))
        save_trained(tuned, "lora", tmp_path / name, below)
        below = above(tmp_path / name)
    torch.testing.assert_close(probe_outputs(load_model(tmp_path / "three")), probe_outputs(tuned))


KILLED = """
import sys
from pathlib import Path
from tests.model.test_methods import *
run_to_the_end(Path(sys.argv[1]), *sys.argv[2:])
"""


def run_to_the_end(folder: Path, method: str, stage: str, optim: str) -> None:
    """Train with checkpoints at every third step, writing down each point and the final weights."""
    model = load_model(GOLDEN / "chatglm2-tiny", dtype="float32")
    points: list[dict[str, Any]] = []
    options: dict[str, Any] = {"log_speed": nothing, "progress": nothing, "seed": 1}
    options["checkpoints"] = Checkpoints(folder / "checkpoints")

    def log(step: int, values: dict[str, float]) -> None:
        points.append({"step": step, **values})
        write_jsonl(folder / "points.jsonl", points)
        time.sleep(float(os.environ.get("SLOW", "0")))

    torch.manual_seed(3)
    values = {"max_steps": 14, "logging_steps": 2, "eval_steps": 4, "save_steps": 3}
    values |= {"lr_scheduler_type": "cosine", "optim": optim}
    params = shape(method, **values, lora_dropout=0.2, neftune_noise_alpha=5.0)
    examples = rows(model, 22)  # epochs end within the run
    if stage == "sft":
        tuned, _ = sft.train(model, TOKENIZER, examples[2:], examples[:2], params, log=log, **options)
    else:
        pairs = [{"sequences": [row["input_ids"], [*row["input_ids"][:-3], 13, 14]]} for row in examples]
        section = Reward(method=method, learning_rate=1e-3, per_device_train_batch_size=4, **values)
        found, _ = reward.train(model, TOKENIZER, pairs[2:], pairs[:2], section, shape=params, log=log, **options)
        tuned = found.backbone
    torch.save(dict(tuned.state_dict()), folder / "weights.pt")


@pytest.mark.parametrize(
    ("method", "stage", "optim"),
    [
        ("lora", "sft", "adamw_torch_fused"),
        ("full", "sft", "adamw_8bit"),  # bitsandbytes has it for CPUs too
        ("lora", "reward", "adamw_torch_fused"),
    ],
)
def test_a_killed_training_ends_as_an_unbroken_one(method: str, stage: str, optim: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_to_the_end(whole, method, stage, optim)
    command = [sys.executable, "-c", KILLED, str(broken), method, stage, optim]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"SLOW": "0.15"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (broken / "checkpoints" / "step-6").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "weights.pt").exists()
    if optim == "adamw_8bit":
        _, state = Checkpoints(broken / "checkpoints").latest()
        assert "torch.uint8" in str(state["optimizer"]), "no moments in 8 bits"
    (broken / "points.jsonl").unlink()
    run_to_the_end(broken, method, stage, optim)
    assert read_jsonl(broken / "points.jsonl") == read_jsonl(whole / "points.jsonl")
    one, other = torch.load(whole / "weights.pt"), torch.load(broken / "weights.pt")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_meant_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="glm"):
        train(load_model(GOLDEN / "chatglm2-tiny", dtype="float32"), shape("lora", learning_rate=1e-5, max_steps=2))
    assert "can hardly change anything" in caplog.text and "lora trains" in caplog.text


def test_a_bad_step_is_kept_in_a_file(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "chatglm2-tiny", dtype="float32")
    model.model.embed_tokens.weight.data[9] = float("nan")  # a token of some rows only
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d.*stopped-step-\d+\.json"):
        train(model, shape("lora"), checkpoints=Checkpoints(tmp_path))
    assert '"input_ids"' in next(tmp_path.glob("stopped-step-*.json")).read_text()
