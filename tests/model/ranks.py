"""Trainings on a tiny random model in one process or in several: python -m tests.model.ranks FOLDER KIND,KIND… [DIE_AT]

KIND is sft-METHOD-LAYOUT-STRATEGY, reward-METHOD-STRATEGY, grpo-LOSS_TYPE or another algorithm; LAYOUT is padded,
packed, rows (packed for tokens_per_step) or selective (packed, activations computed again). Each writes its curves and
what it has trained into FOLDER/KIND; tests/model/test_multi.py compares.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glm.config import Dpo, EmbeddedModel, Grpo, Kto, Ppo, Raft, Reward, Rloo, Rrhf, Sft
from glm.models import embedded, load_tokenizer
from glm.models.lineage import Lineage
from glm.models.saving import save_trained
from glm.training import distributed, dpo, grpo, kto, ppo, raft, reward, rloo, rrhf, sft
from glm.training.checkpoint import Checkpoints
from tasks.launch import first, launched
from tests.model.test_ppo import TOKENIZER, make_actors, prompts

ROOT = Path(__file__).parents[2]
STEPS = 20
EVERY: dict[str, Any] = {
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "logging_steps": 1,
    "eval_steps": 10,
    "warmup_steps": 4,
    "per_device_train_batch_size": 7,
    "tokens_per_forward": 128,
    "save_steps": 5,
}


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
    """Two or three answers to each prompt, which is half as long as one of them."""
    ids = [example["input_ids"] for example in examples(3 * number, seed)]
    found = []
    for at in range(0, 3 * number, 3):
        prompt, answers = ids[at][::2], ids[at : at + 2 + at % 2]
        found.append({"sequences": [prompt + answer for answer in answers], "starts": [len(prompt)] * len(answers)})
    return found


def main(kind: str, folder: Path, die_at: int = -1, stop_at: int = -1) -> None:
    """One training. At step `die_at` the second process kills itself, at `stop_at` all are interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    curves: list[tuple[int, dict[str, float]]] = []

    def log(step: int, values: dict[str, float]) -> None:
        curves.append((step, values))
        if step == die_at and not first():
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_at:
            raise KeyboardInterrupt

    options: dict[str, Any] = {
        "seed": 3,
        "log": log,
        "log_speed": lambda step, values: None,
        "progress": lambda done, total: None,
        "checkpoints": Checkpoints(folder / "checkpoints"),
    }
    torch.manual_seed(0)
    if kind.startswith("sft"):
        numbers = supervised(*kind.split("-")[1:], folder, options)
    elif kind.startswith("reward"):
        numbers = rewarded(*kind.split("-")[1:], folder, options)
    else:
        numbers = improved(kind, folder, options)
    if first():
        (folder / "result.json").write_text(json.dumps({"curves": curves, "numbers": numbers}))


def tiny() -> tuple[Any, Any]:
    tokenizer = load_tokenizer(ROOT / "tests" / "golden" / "chatglm2-e2e")
    shape = EmbeddedModel(hidden_size=64, num_layers=2, ffn_hidden_size=96)
    return embedded.new_model(shape, tokenizer).eval(), tokenizer


def supervised(method: Any, layout: str, strategy: Any, folder: Path, options: dict[str, Any]) -> dict[str, float]:
    base, tokenizer = tiny()
    params = Sft(method=method, lora_dropout=0.0, num_layer_trainable=1, packing=layout != "padded", **EVERY)
    if layout == "selective":
        params = params.model_copy(update={"activation_checkpointing": "selective"})
    if layout == "rows":
        params = params.model_copy(update={"tokens_per_step": 3 * params.tokens_per_forward})
    data = examples(40, 1), examples(11, 2)
    tuned, numbers = sft.train(base, tokenizer, *data, params, strategy=strategy, **options)
    if first():
        save_trained(tuned, method, folder / "model", Lineage(base="base", dtype="float32"), tokenizer=tokenizer)
    return numbers


def rewarded(method: Any, strategy: Any, folder: Path, options: dict[str, Any]) -> dict[str, float]:
    base, tokenizer = tiny()
    # the decay must leave the vocabulary head alone, which has no part in scores: ZeRO takes its gradient for zero
    params, shape = Reward(method=method, weight_decay=0.5, **EVERY), Sft(lora_dropout=0.0)
    data = rankings(30, 1), rankings(8, 2)
    model, numbers = reward.train(base, tokenizer, *data, params, shape=shape, strategy=strategy, **options)
    if first():
        below = Lineage(base="base", dtype="float32")
        save_trained(model.backbone, method, folder / "model", below, tokenizer=tokenizer, score=model.score)
    return numbers


def improved(kind: str, folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """A policy of tests/model/test_ppo.py by one algorithm; its adapters are in the folder above."""
    actors = make_actors(folder.parent / "actors")
    every: dict[str, Any] = {
        "learning_rate": 3e-3,
        "max_steps": STEPS,
        "max_new_tokens": 12,
        "eval_steps": 10,
        "save_steps": 5,
        "batch_size": 14,
    }
    torch.manual_seed(11)
    common = actors, TOKENIZER
    if kind == "ppo":
        ppo_params = Ppo(
            **every,
            mini_batch_size=7,
            gradient_accumulation_steps=3,
            kl_target=2.0,
            kl_stop=1000.0,
            score_norm=True,
            score_clip=2.0,
            whiten_rewards=True,
            entropy_coef=0.01,
            missing_eos_penalty=0.5,
        )
        numbers = ppo.train(*common, prompts(40), prompts(9), ppo_params, **options)
    elif kind == "raft":
        numbers = raft.train(*common, prompts(40), prompts(9), Raft(**every, num_generations=3), **options)
    elif kind == "dpo":
        numbers = dpo.train(*common, ranked(), prompts(9), Dpo(**every, tokens_per_forward=64), **options)
    elif kind == "kto":
        rows = [row for ranking in ranked(40) for row in kto.labelled_ranking(ranking)]  # 7 batches and 2 rows
        numbers = kto.train(*common, rows, prompts(9), Kto(**every), **options)
    elif kind.startswith("grpo"):
        loss_type: Any = kind.removeprefix("grpo-")
        parts = {"num_generations": 3, "gradient_accumulation_steps": 3}
        again = 5 if loss_type == "grpo" else 1
        grpo_params = Grpo(**every, **parts, loss_type=loss_type, num_iterations=again)
        numbers = grpo.train(*common, prompts(40), prompts(9), grpo_params, **options)
    elif kind == "rloo":
        rloo_params = Rloo(**every, num_generations=3, num_iterations=5)
        numbers = rloo.train(*common, prompts(40), prompts(9), rloo_params, **options)
    else:
        numbers = rrhf.train(*common, ranked(), prompts(9), Rrhf(**every, tokens_per_forward=64), **options)
    if first():
        (folder / "model").mkdir()
        save_file(
            {name: value.contiguous() for name, value in actors.policy_state().items()},
            folder / "model" / "policy.safetensors",
        )
    return numbers


def ranked(number: int = 30) -> list[dict[str, Any]]:
    """Rankings of two and three answers."""
    return [
        {"sequences": [prompt + answer for answer in prompts(count)], "starts": [len(prompt)] * count}
        for prompt, count in zip(prompts(number), [2, 3] * (number // 2), strict=True)
    ]


if __name__ == "__main__":
    if launched():
        distributed.join()
    for kind in sys.argv[2].split(","):
        main(kind, Path(sys.argv[1], kind), *map(int, sys.argv[3:]))
