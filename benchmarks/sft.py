"""SFT and reward training, from transformers + PEFT as shipped to this project's path, one change at a time.

    python -m benchmarks.sft                          # the whole table; its nf4, fp4 and int8 need bitsandbytes
    python -m benchmarks.sft --only final,selective   # single rows
    python -m benchmarks.sft --only shared            # reward model: prompts computed for each answer, and once
    python -m benchmarks.sft --cpu                    # packed against padded on the embedded model and its data
    python -m benchmarks.sft --cpu --only shared      # there, prompts computed for each answer, and once

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
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.shapes import (
    CHATGLM1_BOS,
    CHATGLM1_GMASK,
    LENGTHS,
    chatglm1,
    chatglm2,
    examples,
    pairs,
    prefix_examples,
    quantize,
    rankings,
)
from glm.config import Reward, Sft, load_params
from glm.data.collate import pad, pad_ids
from glm.models.adapters import add_lora
from glm.training import reward, sft

WINDOW = 4  # optimizer steps between two readings of the clock
TOKENIZER = SimpleNamespace(pad_token_id=0)  # all that training asks of a tokenizer
Rows = Callable[[], list[dict[str, Any]]]
LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 32, "lora_target": ["query_key_value"], "lora_dropout": 0.0}
EVERY: dict[str, Any] = {"learning_rate": 1e-4, "logging_steps": WINDOW, "lr_scheduler_type": "constant"}
PADDED: dict[str, Any] = {"packing": False, "torch_compile": False, "per_device_train_batch_size": 4}
PACKED: dict[str, Any] = {"tokens_per_step": 4096, "tokens_per_forward": 4096}
FINAL: dict[str, Any] = {**PACKED, "torch_compile": True, "activation_checkpointing": "none"}

UNFUSED: dict[str, Any] = {**FINAL, "fused_layers": False}

# name → (what changed against the row before, values of the section, optimizer steps: a multiple of WINDOW)
PATH: dict[str, tuple[str, dict[str, Any], int]] = {
    "padded": (
        "our padded run: batch 4, loss at labels only, LoRA multiplied in bf16",
        {**PADDED, "activation_checkpointing": "full", "lora_dropout": 0.1},
        12,
    ),
    "packed": (
        "+ packed rows of 4,096 tokens",
        {**UNFUSED, "torch_compile": False, "activation_checkpointing": "full", "lora_dropout": 0.1},
        12,
    ),
    "dropout": (
        "+ no LoRA dropout",
        {**UNFUSED, "torch_compile": False, "activation_checkpointing": "full"},
        12,
    ),
    "compiled": ("+ layers compiled", {**UNFUSED, "activation_checkpointing": "full"}, 16),
    "selected": ("+ selective checkpointing", {**UNFUSED, "activation_checkpointing": "selective"}, 16),
    "unfused": ("+ no checkpointing", UNFUSED, 20),
    "final": ("+ fused layers, the last one at labels only", FINAL, 20),
}
# What else can be chosen, each against `final`.
OTHERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "full": ("full checkpointing", {**FINAL, "activation_checkpointing": "full"}, 16),
    "selective": ("selective checkpointing", {**FINAL, "activation_checkpointing": "selective"}, 16),
    "eager": ("layers not compiled", {**FINAL, "torch_compile": False}, 12),
    "rows-2048": ("the same step in rows of 2,048", {**FINAL, "tokens_per_forward": 2048}, 16),
    "flex": ("attn_implementation flex_attention", {**FINAL, "attn_implementation": "flex_attention"}, 16),
    "all-linear": ("LoRA on all linear layers", {**FINAL, "lora_target": "all-linear"}, 16),
}
AUTO: dict[str, Any] = {**FINAL, "activation_checkpointing": "auto"}
BUDGETS = (32, 20, 15)  # GB, within which `auto` has to choose
# Rankings whose prompts are computed for each answer, and (`-shared`) once: name → (prompt, answers)
RANKED = {"pairs-16": (16, 2), "pairs-128": (128, 2), "pairs-512": (512, 2), "fours-512": (512, 4)}
CHATGLM1_RANKED = "chatglm1-pairs-512"
WAYS = {"": False, "-shared": True}
QUANTIZED = {"nf4": 10, "fp4": 10, "int8": 10}


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


def ours(
    model: PreTrainedModel, values: dict[str, Any], steps: int, *, data: Rows = examples, gigabytes: float | None = None
) -> dict[str, float]:
    """Medians over the windows after the first, when code is compiled and memory found.

    The process may hold no more than `gigabytes`, weights and all that the allocator keeps included.
    """
    windows: list[dict[str, float]] = []
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.memory.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes * 1e9 / whole)
    torch.cuda.reset_peak_memory_stats()

    def speed(step: int, values: dict[str, float]) -> None:
        windows.append(values)

    options: dict[str, Any] = {
        "seed": 0, "log": lambda step, values: None, "log_speed": speed, "progress": lambda done, total: None,
    }  # fmt: skip
    rows = data()
    if "sequences" in rows[0]:
        params = Reward.model_validate({**EVERY, **values, "max_steps": steps})
        shape = Sft.model_validate(LORA)
        trained, _ = reward.train(model, TOKENIZER, rows, [], params, shape=shape, **options)
        trained.backbone.unload()
    else:
        params = Sft.model_validate({**LORA, **EVERY, **values, "max_steps": steps})
        adapted, _ = sft.train(model, TOKENIZER, rows, [], params, **options)
        adapted.unload()
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
    torch._dynamo.config.recompile_limit = 100  # a stage has a process to itself; here all rows compile the same code
    logging.basicConfig(format="  (%(message)s)")
    logging.getLogger("glm").setLevel(logging.INFO)
    began = time.perf_counter()
    models = {"chatglm2": chatglm2(layers)}
    parameters = sum(p.numel() for p in models["chatglm2"].parameters())
    speed, limit = matmul_limit(parameters)
    mean = statistics.mean(len(example["input_ids"]) for example in examples())
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    console.print(f"{parameters / 1e9:.2f} B parameters; lengths {LENGTHS}, mean {mean:.0f}")
    console.print(f"matrix product {speed / 1e12:.0f} TFLOP/s: at most {limit:,.0f} tokens/s")
    console.print()
    console.print("| row | what | tokens/s | examples/s | peak GB | of limit |")
    console.print("| --- | --- | ---: | ---: | ---: | ---: |")

    def row(name: str, what: str, measure: Callable[[PreTrainedModel], dict[str, float]], kind: str) -> None:
        if name not in only:
            return
        start = time.perf_counter()
        try:
            if kind not in models:
                models.clear()
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.memory.set_per_process_memory_fraction(1.0)
                model = chatglm1(layers) if kind == "chatglm1" else chatglm2(layers)
                models[kind] = quantize(model, kind) if kind in QUANTIZED else model
            gc.collect()
            torch.cuda.empty_cache()
            torch.compiler.reset()  # a row compiles as a process of its own would
            found = measure(models[kind])
        except Exception as error:  # one row that fails must not take the others with it
            models.pop(kind, None)
            console.print(f"| {name} | {what} | {type(error).__name__}: {str(error)[:300]} | | | |")
            return
        tokens = found["tokens_per_second"]
        console.print(
            f"| {name} | {what} | {tokens:,.0f} | {found['examples_per_second']:.1f} | {found['peak_memory_gb']:.1f} | "
            f"{100 * tokens / limit:.0f} % |"
        )
        console.print(f"  ({name}: {time.perf_counter() - start:.0f} s)", style="dim", highlight=False)

    def ranked(name: str, prompt: int, answers: int, kind: str) -> None:
        marks = (CHATGLM1_GMASK, CHATGLM1_BOS) if kind == "chatglm1" else ()
        data = partial(rankings, prompt, answers, marks)
        for way, share in WAYS.items():
            values = {**FINAL, "share_prompt": share}
            what = f"{answers} answers to prompts of about {prompt} tokens, " + ("shared" if share else "not shared")
            row(name + way, what, partial(ours, values=values, steps=28, data=data), kind)

    reference = Sft.model_validate({**LORA, "lora_dropout": 0.1})  # the reference's defaults
    shipped = partial(stock, rows=examples(), lora=reference, batch_size=4, steps=16, first=6)
    row("stock", "transformers + PEFT: Trainer, batch 4, gradient checkpointing", shipped, "chatglm2")
    for name, (what, values, steps) in (PATH | OTHERS).items():
        row(name, what, partial(ours, values=values, steps=steps), "chatglm2")
    row("reward", "reward model on pairs, as `final`", partial(ours, values=FINAL, steps=16, data=pairs), "chatglm2")
    for name, (prompt, answers) in RANKED.items():
        ranked(name, prompt, answers, "chatglm2")
    for size in BUDGETS:
        within = partial(ours, values=AUTO, steps=16, gigabytes=size)
        row(f"within-{size}", f"`auto` where the process gets {size} GB", within, "chatglm2")
    for kind, size in QUANTIZED.items():
        within = partial(ours, values=AUTO, steps=16, gigabytes=size)
        row(f"{kind}-{size}", f"{kind} base, `auto` where the process gets {size} GB", within, kind)
        row(kind, f"{kind} base, as `final`", partial(ours, values=FINAL, steps=16), kind)
        eager = {**FINAL, "activation_checkpointing": "full", "torch_compile": False}
        row(
            f"{kind}-eager",
            f"{kind} base, full checkpointing, not compiled",
            partial(ours, values=eager, steps=12),
            kind,
        )
    padded, packed = (partial(ours, steps=12, data=prefix_examples, values=v) for v in (PATH["padded"][1], FINAL))
    row("chatglm1-padded", "ChatGLM-6B, as `padded`", padded, "chatglm1")
    row("chatglm1", "ChatGLM-6B, as `final`", packed, "chatglm1")
    ranked(CHATGLM1_RANKED, 512, 2, "chatglm1")
    console.print(f"\n{time.perf_counter() - began:.0f} s in all")


def cpu(steps: int, only_shared: bool, console: Console) -> None:
    """Examples a second on the stages' own parameters, model and rows, one thread; the ways take turns, five times."""
    from glm.data.encode import dialogue, rankings
    from glm.data.rows import read_split
    from tasks.base_model import load_base

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

    def stage(name: str, packing: bool, fused: bool = False, **values: bool) -> float:
        speeds: list[float] = []
        changes = {"packing": packing, "fused_layers": fused, "max_steps": steps, "logging_steps": steps // 2, **values}
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
        "SFT, packed, fused layers": partial(stage, "sft", True, fused=True),
        "reward, padded": partial(stage, "reward", False),
        "reward, packed": partial(stage, "reward", True, share_prompt=False),
        "reward, packed, fused layers": partial(stage, "reward", True, fused=True, share_prompt=False),
        "reward, packed, fused layers, shared prompts": partial(stage, "reward", True, fused=True, share_prompt=True),
    }
    if only_shared:
        ways = dict(list(ways.items())[-2:])
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, measure in ways.items():
            speeds[name].append(measure())
    console.print(f"CPU, one thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    console.print("| run | examples/s | times its first row |\n| --- | ---: | ---: |")
    for name, found in speeds.items():
        first = next(speeds[each] for each in speeds if each.split(",")[0] == name.split(",")[0])
        median = statistics.median(found)
        console.print(f"| {name} | {median:.0f} | {median / statistics.median(first):.2f} |")


def main() -> None:
    names = ["stock", *PATH, *OTHERS, "reward", *(f"within-{size}" for size in BUDGETS)]
    names += [f"{kind}{way}" for kind, size in QUANTIZED.items() for way in (f"-{size}", "", "-eager")]
    names += ["chatglm1-padded", "chatglm1"]
    shared = [f"{name}{way}" for name in (*RANKED, CHATGLM1_RANKED) for way in WAYS]
    names += shared
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(names), help=f"rows, by comma; or shared: {', '.join(names)}")
    parser.add_argument("--layers", type=int, default=28, help="fewer for a quick look")
    parser.add_argument("--free", action="store_true", help="without the determinism switches of a stage")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--steps", type=int, default=24, help="of each CPU run")
    options = parser.parse_args()
    console = Console(width=200, soft_wrap=True)
    if options.cpu:
        cpu(options.steps, options.only == "shared", console)
    else:
        gpu(shared if options.only == "shared" else options.only.split(","), options.layers, not options.free, console)


if __name__ == "__main__":
    main()
