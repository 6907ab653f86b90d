"""How much faster are several GPUs, and do they compute the same?

    python -m benchmarks.multi_gpu                     # at 1, 2, 4, 8 GPUs, as far as there are so many
    python -m benchmarks.multi_gpu --tiny --counts 1,2  # tiny shapes; on the CPU where there is no GPU

A Glm of ChatGLM2-6B's shape (6.2 B parameters, random weights, bfloat16) and examples of the lengths of
benchmarks/sft.py; each count is a launch of its own, as `launch.num_processes` makes it.

    lora    SFT, LoRA r=8 on query_key_value, DDP; a step has 4,096 tokens a GPU
    fsdp    SFT, every weight, FSDP2; a step has a row of 2,048 tokens a GPU
    zero3   the same by DeepSpeed's ZeRO stage 3
    ppo     whole PPO steps of 64 prompts a GPU, 128 + 128 tokens; tokens are those of prompts and answers
    losses  20 steps of `lora` on the same 8 rows of 4,096 tokens a step, whatever the count: the largest relative
            difference of a loss from that of one GPU

Tokens a second are of all GPUs together, medians after the first window of steps; a GPU's work stays the same, so that
n GPUs would do n times as much at best. Memory is that of the first GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from benchmarks.ppo import build, make_actors, our_step
from benchmarks.shapes import CHATGLM2, chatglm2, examples
from glm.config import Launch, Ppo, Sft, Strategy
from glm.errors import InputError
from glm.training import distributed, sft
from tasks.launch import first, launch, launched

WINDOW = 4  # optimizer steps between two readings of the clock
KINDS = ("lora", "fsdp", "zero3", "ppo", "losses")
STRATEGIES: dict[str, Strategy] = {"fsdp": "fsdp", "zero3": "deepspeed_zero3"}  # of method full
LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 32, "lora_target": ["query_key_value"], "lora_dropout": 0.0}
EVERY: dict[str, Any] = {"logging_steps": WINDOW, "lr_scheduler_type": "constant", "learning_rate": 1e-4}


class Tokenizer:
    """All that training asks of a tokenizer."""

    pad_token_id = 0


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "head_dim": 16}
    model = GlmForCausalLM(
        GlmConfig(num_hidden_layers=2, num_key_value_heads=2, **shape, **CHATGLM2 | {"vocab_size": 1024})
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def train(kind: str, count: int, tiny: bool) -> dict[str, Any]:
    """One SFT training in this process, one of `count`."""
    full = kind in STRATEGIES
    row, steps = (2048, 12) if full else (4096, 20)
    if tiny:
        row, steps = 1024, 8
    values: dict[str, Any] = {
        **EVERY,
        "max_steps": steps,
        "tokens_per_forward": row,
        "tokens_per_step": row * (8 if kind == "losses" else count),
        "torch_compile": not tiny,
        "activation_checkpointing": "full" if full and not tiny else "none",
    }
    if kind == "losses":
        values["logging_steps"] = 1
    values |= {"method": "full", "learning_rate": 1e-5} if full else LORA
    rows = examples(200 if tiny else 3000)
    if tiny:
        rows = [{name: [id % 1024 if id >= 0 else id for id in ids] for name, ids in each.items()} for each in rows]
    windows: list[dict[str, float]] = []
    losses: list[float] = []
    sft.train(
        tiny_model() if tiny else chatglm2(28),
        Tokenizer(),
        rows,
        [],
        Sft.model_validate(values),
        seed=0,
        strategy=STRATEGIES.get(kind, "ddp"),
        log=lambda step, found: losses.append(found["loss"]),
        log_speed=lambda step, found: windows.append(found),
        progress=lambda done, total: None,
    )
    kept = windows[1:]
    return {"losses": losses, "tokens_per_second": statistics.median(window["tokens_per_second"] for window in kept)}


def improve(count: int, tiny: bool) -> dict[str, Any]:
    """PPO steps in this process, one of `count`."""
    on_gpu = torch.cuda.is_available()
    rows, length = (8 * count, 16) if tiny else (64 * count, 128)
    model = build("cuda" if on_gpu else "cpu", tiny)
    actors = make_actors(model, "query_key_value")
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(100, model.config.vocab_size, (rows, length), generator=draw).tolist()
    parts = 1 if tiny else 12 * count
    params = Ppo(
        batch_size=rows,
        mini_batch_size=rows,
        gradient_accumulation_steps=parts,
        ppo_epochs=1,
        max_new_tokens=length,
    )
    optimizer = torch.optim.AdamW(actors.trained, lr=1e-5)
    our_step(actors, prompts, params, optimizer)  # compiles
    seconds = statistics.median(sum(our_step(actors, prompts, params, optimizer)) for _ in range(3))
    return {"tokens_per_second": rows * 2 * length / seconds}


def measure(kind: str, count: int, tiny: bool, path: Path) -> None:
    """What a process that was started for it does; the first one writes the result."""
    if launched():
        distributed.join()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = improve(count, tiny) if kind == "ppo" else train(kind, count, tiny)
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    if first():
        path.write_text(json.dumps(found))


def run(kind: str, count: int, tiny: bool) -> dict[str, Any] | None:
    """Start `count` processes and read the result; None if they failed, which they have said."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "result.json")
        command = [
            "-m",
            "benchmarks.multi_gpu",
            "--measure",
            kind,
            "--counts",
            str(count),
            "--path",
            str(path),
            *["--tiny"] * tiny,
        ]
        if count == 1:
            status = subprocess.run([sys.executable, *command]).returncode
        else:
            status = launch(Launch(num_processes=count, strategy=STRATEGIES.get(kind, "ddp")), command, kind)
        return json.loads(path.read_text()) if status == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = [int(count) for count in options.counts.split(",")]
    if options.measure:
        measure(options.measure, counts[0], options.tiny, options.path)
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if torch.cuda.is_available():
        counts = [count for count in counts if count <= torch.cuda.device_count()]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo"
    table = Table("kind", "processes", "tokens/s", "times one", "peak GB", "losses differ by")
    for kind in options.only.split(","):
        one: dict[str, Any] | None = None
        for count in counts:
            start = time.perf_counter()
            try:
                found = run(kind, count, options.tiny)
            except InputError as error:  # DeepSpeed is missing
                print(error)
                found = None
            seconds = time.perf_counter() - start
            print(f"{kind} on {count}: {seconds:.0f} s, {'done' if found else 'failed'}", flush=True)
            if found is None:
                table.add_row(kind, str(count), "failed", "", "", "")
                continue
            one = found if count == 1 else one
            speed, apart = found["tokens_per_second"], ""
            if kind == "losses" and one:
                pairs = zip(found["losses"], one["losses"], strict=True)
                apart = f"{max(abs(loss - alone) / alone for loss, alone in pairs):.1e}"
            times = f"{speed / one['tokens_per_second']:.2f}" if one else ""
            table.add_row(kind, str(count), f"{speed:,.0f}", times, f"{found['peak_gb']:.1f}", apart)
    console = Console(width=100)
    console.print(f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    console.print(table)


if __name__ == "__main__":
    main()
