"""PPO's rivals on the tiny Glm of test_ppo: their losses by hand, that they learn, that they resume bit for bit."""

import importlib
from pathlib import Path

import pytest
import torch

from glm import config
from glm.training import kto
from glm.training.checkpoint import Checkpoints
from tests.model.test_ppo import TOKENIZER, make_actors, prompts, same, state_of

COMMON = {"learning_rate": 3e-3, "batch_size": 4, "max_new_tokens": 8, "save_steps": 2, "eval_steps": 3}
PARAMS = {
    "dpo": config.Dpo(**COMMON, tokens_per_forward=64),
    "rrhf": config.Rrhf(**COMMON, tokens_per_forward=64),
    "kto": config.Kto(**COMMON),
    "raft": config.Raft(**COMMON, num_generations=4),
    "grpo": config.Grpo(**COMMON, num_generations=4, beta=0.01),
    "rloo": config.Rloo(**COMMON, num_generations=4, beta=0.01, gradient_accumulation_steps=2),
}


def rankings(number: int = 12, answers: int = 2) -> list[dict]:
    """Better answers have tokens of the lower half of the vocabulary, the one that the reward model likes."""
    draw = torch.Generator().manual_seed(3)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(3, 8, (), generator=draw))
        return [*torch.randint(low, high, (length,), generator=draw).tolist(), TOKENIZER.eos_token_id]

    ranges = [(3, 31), (31, 61), (46, 61)][:answers]
    return [
        {"sequences": [prompt + tokens(*bounds) for bounds in ranges], "starts": [len(prompt)] * answers}
        for prompt in prompts(number)
    ]


def rows_for(algorithm: str):
    if algorithm == "kto":
        return [row for ranking in rankings() for row in kto.labelled_ranking(ranking)]
    return rankings() if algorithm in ("dpo", "rrhf") else prompts(8)


def train(algorithm: str, folder: Path, max_steps: int, checkpoints: str = "checkpoints", stop_at: int | None = None):
    """Actors, numbers and curves of a run; one that stops at a look raises KeyboardInterrupt there."""
    actors = make_actors(folder)
    curves: list = []

    def show(step: int, judged) -> None:
        if stop_at is not None and step == stop_at:
            raise KeyboardInterrupt

    torch.manual_seed(11)
    numbers = importlib.import_module(f"glm.training.{algorithm}").train(
        actors,
        TOKENIZER,
        rows_for(algorithm),
        prompts(16),
        PARAMS[algorithm].model_copy(update={"max_steps": max_steps}),
        seed=5,
        log=lambda step, values: curves.append((step, values)),
        progress=lambda done, total: None,
        show=show,
        checkpoints=Checkpoints(folder / checkpoints),
    )
    return actors, numbers, curves


@pytest.mark.parametrize("algorithm", PARAMS)
def test_a_training_that_was_stopped_ends_as_an_unbroken_one(algorithm: str, tmp_path: Path) -> None:
    """5 steps with looks after 3 and 5; stopped at the look of step 3, so after the checkpoint of step 2."""
    unbroken = train(algorithm, tmp_path, 5, "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(algorithm, tmp_path, 5, stop_at=3)
    broken = train(algorithm, tmp_path, 5)
    assert same(state_of(unbroken[0]), state_of(broken[0]))
    assert unbroken[1:] == broken[1:]
    assert [step for step, _ in unbroken[2]] == list(range(6))
    assert unbroken[1]["kl_before"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("algorithm", PARAMS)
def test_it_learns_and_only_the_policy_changes(algorithm: str, tmp_path: Path) -> None:
    before = state_of(make_actors(tmp_path))
    actors, numbers, curves = train(algorithm, tmp_path, 12)
    assert numbers["reward"] > numbers["reward_before"] + 0.1 * numbers["reward_std_before"]
    if "margin" in curves[-1][1]:
        assert curves[-1][1]["margin"] > curves[1][1]["margin"]
    after = state_of(actors)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".default." in name}
