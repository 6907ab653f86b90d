"""SFT and reward training, from transformers + PEFT as shipped to this project's path, one change at a time.

    python benchmarks/sft.py                          # the whole table, under four minutes on one H100
    python benchmarks/sft.py --only final,selective   # single rows
    python benchmarks/sft.py --only nf4               # needs bitsandbytes
    python benchmarks/sft.py --cpu                    # packed against padded on the embedded model and its data

On the GPU: a ChatGLM2-6B shape (6.2 B parameters, random weights, bfloat16), LoRA r=8 on query_key_value (q, k and v),
examples of alpaca-like lengths (log-normal, 24 to 1,024 tokens, mean about 200; the first quarter is the prompt). All
rows but the first are `glm.training.sft.train` and `glm.training.reward.train` with values of params.yaml and nothing
else, under the determinism switches of a stage. Tokens are real ones, without padding. `of limit` compares with the
measured bf16 matrix product at 4 operations a parameter and token: forward, and the gradient of the activations.

--cpu needs `dvc repro preprocess base` to have run here.
"""

import argparse
import gc
import logging
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from rich.console import Console
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from glm.config import Reward, Sft, load_params
from glm.data.collate import pad, pad_ids
from glm.models.adapters import add_lora
from glm.training import reward, sft

LENGTHS = "log-normal (5.07, 0.7), 24 to 1,024"
EXAMPLES = 3000
WINDOW = 4  # optimizer steps between two readings of the clock
CHATGLM2 = {"vocab_size": 65024, "rms_norm_eps": 1e-5, "eos_token_id": 2, "pad_token_id": 0, "attention_bias": True}
TOKENIZER = SimpleNamespace(pad_token_id=0)  # all that training asks of a tokenizer
LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 32, "lora_target": ["query_key_value"], "lora_dropout": 0.0}
EVERY: dict[str, Any] = {"learning_rate": 1e-4, "logging_steps": WINDOW, "lr_scheduler_type": "constant"}
PADDED: dict[str, Any] = {"packing": False, "torch_compile": False, "per_device_train_batch_size": 4}
PACKED: dict[str, Any] = {"tokens_per_step": 4096, "tokens_per_forward": 4096}
FINAL: dict[str, Any] = {**PACKED, "torch_compile": True, "activation_checkpointing": "none"}

# name → (what changed against the row before, values of the section, optimizer steps: a multiple of WINDOW)
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "padded": (
        "our padded run: batch 4, loss at labels only, LoRA multiplied in bf16",
        {**PADDED, "activation_checkpointing": "full", "lora_dropout": 0.1},
        12,
    ),
    "packed": (
        "+ packed rows of 4,096 tokens",
        {**PACKED, "torch_compile": False, "activation_checkpointing": "full", "lora_dropout": 0.1},
        12,
    ),
    "dropout": (
        "+ no LoRA dropout",
        {**PACKED, "torch_compile": False, "activation_checkpointing": "full"},
        12,
    ),
    "full": ("+ layers compiled", {**FINAL, "activation_checkpointing": "full"}, 16),
    "selective": ("+ selective checkpointing", {**FINAL, "activation_checkpointing": "selective"}, 16),
    "final": ("+ no checkpointing", FINAL, 20),
    "rows-2048": ("the same step in rows of 2,048", {**FINAL, "tokens_per_forward": 2048}, 16),
    "auto": ("`final` with the choice of checkpointing left to `auto`", {**PACKED, "torch_compile": True}, 16),
}


def length(rng: random.Random) -> int:
    return int(min(1024, max(24, rng.lognormvariate(5.07, 0.7))))


def examples(count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Random tokens of the stated lengths; labels on the last three quarters."""
    rng, found = random.Random(0), []
    for size in [length(rng) for _ in range(count)]:
        ids = [rng.randrange(100, 64000) for _ in range(size)]
        found.append({"input_ids": ids, "labels": [-100] * (size // 4) + ids[size // 4 :]})
    return found


def pairs() -> list[dict[str, Any]]:
    """The same sequences, two to a ranking."""
    ids = [example["input_ids"] for example in examples()]
    return [{"sequences": [better, worse]} for better, worse in zip(ids[::2], ids[1::2], strict=True)]


def base_model(layers: int) -> PreTrainedModel:
    """Random weights of standard deviation 0.02, made on the GPU."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = GlmConfig(num_hidden_layers=layers, rope_parameters=rope, **CHATGLM2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return GlmForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def quantize(model: PreTrainedModel) -> None:
    """Put the layers' linears into bitsandbytes' nf4, in place, as `load_model(quantization="nf4")` has them."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    for name, linear in list(model.base_model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            with torch.device("meta"):
                small = Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
            weight = linear.weight.data.cpu()
            small.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").cuda()
            small.bias = linear.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.base_model.layers.get_submodule(parent), leaf, small)
            linear.weight = None
    model.is_loaded_in_4bit = True  # what PEFT looks at
    gc.collect()
    torch.cuda.empty_cache()


def matmul_limit(parameters: int) -> tuple[float, float]:
    """(bf16 operations per second of a large product, tokens per second if training were nothing else)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    speed = 20 * 2 * 8192**3 / (time.perf_counter() - start)
    return speed, speed / (4 * parameters)


def ours(model: PreTrainedModel, values: dict[str, Any], steps: int, *, stage: str = "sft") -> dict[str, float]:
    """Medians over the windows after the first, when code is compiled and memory found."""
    windows: list[dict[str, float]] = []
    torch.cuda.reset_peak_memory_stats()

    def speed(step: int, values: dict[str, float]) -> None:
        windows.append(values)

    options: dict[str, Any] = {
        "seed": 0, "log": lambda step, values: None, "log_speed": speed, "progress": lambda done, total: None,
    }  # fmt: skip
    lora = Sft.model_validate({**LORA, **EVERY, **values, "max_steps": steps} if stage == "sft" else LORA)
    if stage == "sft":
        adapted, _ = sft.train(model, TOKENIZER, examples(), [], lora, **options)
        adapted.unload()
    else:
        params = Reward.model_validate({**EVERY, **values, "max_steps": steps})
        trained, _ = reward.train(model, TOKENIZER, pairs(), [], params, shape=lora, **options)
        trained.backbone.unload()
    kept = windows[1:]
    return {name: statistics.median(window[name] for window in kept) for name in kept[0]}


class Clock(TrainerCallback):
    """Reads the clock after a synchronisation at two steps."""

    def __init__(self, first: int) -> None:
        self.first, self.times = first, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (self.first, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def stock(
    model: PreTrainedModel, rows: list[dict[str, Any]], lora: Sft, *, batch_size: int, steps: int, first: int
) -> dict[str, float]:
    """transformers' Trainer and PEFT as they come, timed from step `first` to the last of `steps`."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    adapted = add_lora(model, lora)
    seen: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.append(sum(len(row["input_ids"]) for row in batch))
        labels = pad([row["labels"] for row in batch], -100, "right")
        return {**pad_ids([row["input_ids"] for row in batch], 0, "right"), "labels": labels}

    clock = Clock(first)
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(
            output_dir="/tmp/benchmark-sft", max_steps=steps, per_device_train_batch_size=batch_size, bf16=on_gpu,
            gradient_checkpointing=on_gpu, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
            remove_unused_columns=False, seed=0, learning_rate=1e-4, use_cpu=not on_gpu,
        ),
        train_dataset=rows, data_collator=collate, callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = clock.times[1] - clock.times[0]
    adapted.unload()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return {
        "tokens_per_second": sum(seen[first:steps]) / seconds,
        "examples_per_second": batch_size * (steps - first) / seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
    }


def gpu(only: list[str], layers: int, deterministic: bool, console: Console) -> None:
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    logging.basicConfig(format="  (%(message)s)")
    logging.getLogger("glm").setLevel(logging.INFO)
    began = time.perf_counter()
    model = base_model(layers)
    parameters = sum(p.numel() for p in model.parameters())
    speed, limit = matmul_limit(parameters)
    mean = statistics.mean(len(example["input_ids"]) for example in examples())
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    console.print(f"{parameters / 1e9:.2f} B parameters; lengths {LENGTHS}, mean {mean:.0f}")
    console.print(f"matrix product {speed / 1e12:.0f} TFLOP/s: at most {limit:,.0f} tokens/s")
    console.print()
    console.print("| row | what | tokens/s | examples/s | peak GB | of limit |")
    console.print("| --- | --- | ---: | ---: | ---: | ---: |")

    def row(name: str, what: str, measure: Callable[[], dict[str, float]]) -> None:
        if name not in only:
            return
        gc.collect()
        torch.cuda.empty_cache()
        start = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # one row that fails must not take the others with it
            console.print(f"| {name} | {what} | {type(error).__name__}: {str(error)[:300]} | | | |")
            return
        tokens = found["tokens_per_second"]
        console.print(
            f"| {name} | {what} | {tokens:,.0f} | {found['examples_per_second']:.1f} | {found['peak_memory_gb']:.1f} | "
            f"{100 * tokens / limit:.0f} % |"
        )
        console.print(f"  ({name}: {time.perf_counter() - start:.0f} s)", style="dim", highlight=False)

    reference = Sft.model_validate({**LORA, "lora_dropout": 0.1})  # the reference's defaults
    measure = partial(stock, model, examples(), reference, batch_size=4, steps=16, first=6)
    row("stock", "transformers + PEFT: Trainer, batch 4, gradient checkpointing", measure)
    for name, (what, values, steps) in ROWS.items():
        row(name, what, partial(ours, model, values, steps))
    row("reward", "reward model on pairs, as `final`", partial(ours, model, FINAL, 16, stage="reward"))
    if "nf4" in only:
        quantize(model)
        for name, compiled in (("nf4-eager", False), ("nf4", True)):
            values = {**FINAL, "activation_checkpointing": "full", "torch_compile": compiled}
            row(name, f"nf4 base, as `full`, compiled: {compiled}".lower(), partial(ours, model, values, 16))
    console.print(f"\n{time.perf_counter() - began:.0f} s in all")


def cpu(steps: int, console: Console) -> None:
    """Examples a second on the stages' own parameters, model and rows, one thread; the ways take turns, five times."""
    from glm.data.encode import dialogue
    from glm.data.rows import read_split
    from tasks.base_model import load_base
    from tasks.reward import rankings

    torch.set_num_threads(1)
    params = load_params("params.yaml")
    _, tokenizer = load_base(params)
    stored = {stage: read_split("prepared/rows", stage, "train") for stage in ("sft", "reward")}
    dialogues = [dialogue(tokenizer, row["messages"], params.data) for row in stored["sft"]]
    ranked = [rankings(tokenizer, row, params.data) for row in stored["reward"]]

    def transformers() -> float:
        size = params.sft.per_device_train_batch_size
        model, _ = load_base(params)
        found = stock(model, dialogues, params.sft, batch_size=size, steps=steps, first=steps // 2)
        return found["examples_per_second"]

    def stage(name: str, packing: bool) -> float:
        speeds: list[float] = []
        changes = {"packing": packing, "max_steps": steps, "logging_steps": steps // 2}
        section = getattr(params, name).model_copy(update=changes)
        model, _ = load_base(params)
        options: dict[str, Any] = {
            "seed": 0, "log": lambda step, values: None, "progress": lambda done, total: None,
            "log_speed": lambda step, values: speeds.append(values["examples_per_second"]),
        }  # fmt: skip
        if name == "sft":
            sft.train(model, tokenizer, dialogues, [], section, **options)
        else:
            reward.train(model, tokenizer, ranked, [], section, shape=params.sft, **options)
        return speeds[-1]

    ways: dict[str, Callable[[], float]] = {
        "SFT, transformers + PEFT, padded": transformers,
        "SFT, padded": partial(stage, "sft", False),
        "SFT, packed": partial(stage, "sft", True),
        "reward, padded": partial(stage, "reward", False),
        "reward, packed": partial(stage, "reward", True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, measure in ways.items():
            speeds[name].append(measure())
    console.print(f"CPU, one thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    console.print("| run | examples/s | times its first row |\n| --- | ---: | ---: |")
    for name, found in speeds.items():
        first = speeds["reward, padded" if name.startswith("reward") else "SFT, transformers + PEFT, padded"]
        median = statistics.median(found)
        console.print(f"| {name} | {median:.0f} | {median / statistics.median(first):.2f} |")


def main() -> None:
    names = ["stock", *ROWS, "reward"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(names), help=f"rows, by comma: {', '.join(names)}, nf4")
    parser.add_argument("--layers", type=int, default=28, help="fewer for a quick look")
    parser.add_argument("--free", action="store_true", help="without the determinism switches of a stage")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--steps", type=int, default=24, help="of each CPU run")
    options = parser.parse_args()
    console = Console(width=200, soft_wrap=True)
    if options.cpu:
        cpu(options.steps, console)
    else:
        gpu(options.only.split(","), options.layers, not options.free, console)


if __name__ == "__main__":
    main()
