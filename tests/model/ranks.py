"""Trainings on a tiny random model in one or several processes: python -m tests.model.ranks KIND FOLDER.

Each writes its curves and what it trained into FOLDER; tests/model/test_multi.py compares.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glm.config import EmbeddedModel, Reward, Sft
from glm.models import embedded, load_tokenizer
from glm.models.lineage import Lineage
from glm.models.saving import save_trained
from glm.training import distributed, reward, sft
from glm.training.checkpoint import Checkpoints
from tasks.launch import first, launched

ROOT = Path(__file__).parents[2]
STEPS = 20
EVERY: dict[str, Any] = {
    "learning_rate": 1e-3, "max_steps": STEPS, "logging_steps": 1, "eval_steps": 10, "warmup_steps": 4,
    "per_device_train_batch_size": 7, "tokens_per_forward": 128, "save_steps": 5,
}  # fmt: skip


def examples(number: int, seed: int) -> list[dict[str, Any]]:
    """Random tokens of very different lengths, and of different shares of labels."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        size, prompt = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((6, 60), (1, 5)))
        ids = torch.randint(10, 1000, (size,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def rankings(number: int, seed: int) -> list[dict[str, Any]]:
    ids = [example["input_ids"] for example in examples(3 * number, seed)]
    groups = [ids[at : at + 2 + at % 2] for at in range(0, 3 * number, 3)]
    return [{"sequences": group, "starts": [2] * len(group)} for group in groups]


def main(kind: str, folder: Path, die_at: int = -1) -> None:
    torch.manual_seed(0)
    if launched():
        distributed.join()
    tokenizer = load_tokenizer(ROOT / "tests" / "golden" / "chatglm2-e2e")
    shape = EmbeddedModel(hidden_size=64, num_layers=2, ffn_hidden_size=96)
    base = embedded.new_model(shape, tokenizer).eval()
    curves: list[tuple[int, dict[str, float]]] = []

    def log(step: int, values: dict[str, float]) -> None:
        curves.append((step, values))
        if step == die_at and not first():
            os.kill(os.getpid(), signal.SIGKILL)

    options: dict[str, Any] = {
        "seed": 3, "log": log, "log_speed": lambda step, values: None, "progress": lambda done, total: None,
        "checkpoints": Checkpoints(folder / "checkpoints"),
    }  # fmt: skip
    numbers: dict[str, float]
    if kind.startswith("sft"):
        _, method, packing, strategy = kind.split("-")
        params = Sft(method=method, lora_dropout=0.0, packing=packing == "packed", **EVERY)
        tuned, numbers = sft.train(
            base, tokenizer, examples(40, 1), examples(11, 2), params, strategy=strategy, **options
        )
        if first():
            save_trained(tuned, method, folder / "model", Lineage(base="base", dtype="float32"), tokenizer=tokenizer)
    elif kind.startswith("reward"):
        _, method, strategy = kind.split("-")
        params = Reward(method=method, **EVERY)
        model, numbers = reward.train(
            base, tokenizer, rankings(30, 1), rankings(8, 2), params, shape=Sft(lora_dropout=0.0), strategy=strategy,
            **options,
        )  # fmt: skip
        if first():
            save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, folder / "model")
    if first():
        (folder / "result.json").write_text(json.dumps({"curves": curves, "numbers": numbers}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
