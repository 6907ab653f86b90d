"""What the steps `reward` and `reward_judge` have in common: training a reward model on prepared/rows/reward.

A run that was killed goes on from its last checkpoint when the same command is given again on the same inputs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.base_model import load_base_tokenizer, load_on
from tasks.stage import Stage
from tasks.tokenized import tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glm.data.cache import TokenizedRows
    from glm.models.lineage import Lineage
    from glm.training.checkpoint import Checkpoints
    from glm.training.reward import RewardModel


@dataclass
class Trained:
    """A reward model, its training's numbers, and the rows train, dev and test."""

    model: "RewardModel"
    numbers: dict[str, float]
    tokenizer: "PreTrainedTokenizerBase"
    examples: "dict[str, TokenizedRows]"
    below: "Lineage"
    checkpoints: "Checkpoints"  # to be cleared when all that comes of the model is kept


def train(stage: Stage, below: "Lineage", *, start: Path | None, seed: int) -> Trained:
    """Train by `reward.method` on top of `below`: a copy of the artifact `start`, or something fresh."""
    from glm.training import reward
    from glm.training.checkpoint import Checkpoints

    params = stage.params
    below.check(params.reward.method)
    model, tokenizer = load_on(below), load_base_tokenizer()
    examples = {split: tokenized(stage, tokenizer, "reward", split) for split in ("train", "dev", "test")}
    checkpoints = Checkpoints(stage.checkpoint_folder, keep=params.reward.save_total_limit)
    trained, numbers = reward.train(
        model,
        tokenizer,
        examples["train"],
        examples["dev"],
        params.reward,
        shape=params.sft,
        start=start,
        checkpoints=checkpoints,
        strategy=params.launch.strategy,
        seed=seed,
        log=stage.log,
        log_speed=stage.log_speed,
        progress=stage.progress,
    )
    return Trained(trained, numbers, tokenizer, examples, below, checkpoints)


def save(stage: Stage, trained: Trained, folder: str) -> None:
    """Write the reward model into `folder`."""
    from glm.models.saving import save_trained

    method, model = stage.params.reward.method, trained.model
    save_trained(model.backbone, method, folder, trained.below, tokenizer=trained.tokenizer, score=model.score)
