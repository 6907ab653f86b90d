"""Reward model: a tuned model and a scalar head that give the better answer the higher score.

The score of a sequence is the head's value at its last token, the answer's end. The loss is in
`glm.training.ranking_loss`. Packed, the answers of a ranking share the computation of their prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.config import Reward, Sft, Strategy
from glm.data.collate import pad_ids
from glm.models import methods
from glm.models.adapters import load_lora, load_score, trainable_count
from glm.models.methods import Tunable
from glm.training.fused_layer import hidden_at
from glm.training.guards import say_what_comes
from glm.training.make_trainer import Surroundings, trainer_for
from glm.training.packing import Packing, packed_row, step_rows, token_count
from glm.training.plan import plan
from glm.training.ranking_loss import ranking_loss
from glm.training.trainer import require_rows


class RewardModel(nn.Module):
    """A causal LM's tuned backbone, and a head Linear(hidden → 1) in float32."""

    def __init__(self, backbone: Tunable, score: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.score = score.to(backbone.device)

    def forward(self, ends: Tensor, *, fused: bool = False, **inputs: Any) -> Tensor:
        """Scores [n] of the sequences that end at `ends` [n], positions in the flattened rows of `inputs`.

        `fused`: the backbone's layers are, and give only what is asked for.
        """
        return self.score(hidden_at(self.backbone, ends, fused=fused, **inputs).float()).squeeze(-1)


class RewardLoss(nn.Module):
    """Maps a micro-batch of `RankingCollator` to the sum of its rankings' losses."""

    def __init__(self, model: RewardModel, params: Reward, *, fused: bool = False) -> None:
        super().__init__()
        self.model = model
        self.params = params
        self.fused = fused

    def forward(self, sizes: list[int], **inputs: Any) -> Tensor:
        losses = [ranking_loss(ranking, self.params) for ranking in self.model(fused=self.fused, **inputs).split(sizes)]
        return torch.stack(losses).sum()


class RankingCollator:
    """Rankings, best answer first, → the micro-batches of a step, packed or padded, and the number of rankings.

    A ranking is never split. `sizes` says how many answers each has. Packed, it also takes rows of rankings.
    """

    def __init__(self, pad_id: int, packing: Packing | None, micro_batch_size: int) -> None:
        self.pad_id = pad_id
        self.packing = packing
        self.micro_batch_size = micro_batch_size

    def __call__(self, step: list[Any]) -> dict[str, Any]:
        rows = step_rows(step, self.packing, self.micro_batch_size)
        rankings = [ranking for row in rows for ranking in row]
        return {
            "micro_batches": [self._inputs(row) for row in rows],
            "items": len(rankings),
            "tokens": token_count(rankings, self.packing),
            "examples": len(rankings),
        }

    def _inputs(self, rankings: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [sequence for ranking in rankings for sequence in ranking["sequences"]]
        sizes = [len(ranking["sequences"]) for ranking in rankings]
        if self.packing is None:
            return {**padded(sequences, self.pad_id), "sizes": sizes}
        row = packed_row(sequences, self.packing, self.pad_id, sizes)
        return {**row, "ends": row["cu_seq_lens_q"][1 : len(sequences) + 1].long() - 1, "sizes": sizes}


def padded(sequences: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    """A reward model's inputs for right-padded sequences."""
    inputs = pad_ids(sequences, pad_id, "right")
    lengths = inputs["attention_mask"].sum(-1)
    return {**inputs, "ends": torch.arange(len(sequences)) * inputs["input_ids"].shape[1] + lengths - 1}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Sequence[dict[str, Any]],
    dev_set: Sequence[dict[str, Any]],
    params: Reward,
    *,
    shape: Sft,
    seed: int,
    start: Path | None = None,
    strategy: Strategy = "ddp",
    **surroundings: Unpack[Surroundings],
) -> tuple[RewardModel, dict[str, float]]:
    """Train by `params.method` on examples of `sequences` (token ids of prompt + answer, best answer first).

    What is trained starts as a copy of the folder `start`, or fresh in the given `shape` where that is None; the head
    starts at zero, so that the first scores are all 0 and the first loss is log 2. Returns the model and `accuracy`,
    `margin`, `pairwise_loss` on `dev_set`, `train_loss`, `steps`, `trainable_parameters`, `trainable_percent`. With
    `checkpoints` a killed run goes on, see `StepTrainer`.

    Raises:
        InputError: no training rows, or something is to be trained that the model does not have.
        FloatingPointError: the loss became NaN, infinite or zero.
    """
    require_rows(train_set, "reward")
    backbone = methods.start(model, params.method, shape, start)
    score = nn.Linear(model.config.hidden_size, 1, bias=False)
    nn.init.zeros_(score.weight)
    reward_model = RewardModel(backbone, score)
    options: dict[str, Any] = {
        "stage": "reward",
        "seed": seed,
        "strategy": strategy,
        "share_prompt": params.share_prompt,
    }
    with without_head(backbone):
        trained, total = trainable_count(reward_model)
        steps = plan(backbone, train_set, lambda example: example["sequences"], params, **options)
        say_what_comes(backbone, params.method, params, steps, stage="reward")
        loss = RewardLoss(reward_model, params, fused=steps.fused)
        collator = RankingCollator(tokenizer.pad_token_id, steps.packing, params.per_device_train_batch_size)
        with trainer_for(loss, collator, dev_set, params, steps, seed=seed, **surroundings) as trainer:
            trainer.run()
    methods.finish(backbone, params.method)
    numbers = {
        "train_loss": trainer.train_loss,
        "steps": trainer.state.global_step,
        "trainable_parameters": trained,
        "trainable_percent": 100 * trained / total,
    }
    if dev_set:
        numbers |= evaluate(reward_model.eval(), tokenizer, dev_set, params.per_device_eval_batch_size)
    return reward_model, numbers


@contextmanager
def without_head(backbone: Tunable) -> Iterator[None]:
    """Inside, the vocabulary head is not trained, whatever the method: scores do not come from it.

    Where it has weights of its own, that is. ZeRO takes a gradient that is not there for zero, and decays the weight.
    """
    head, embedding = backbone.get_output_embeddings(), backbone.get_input_embeddings()
    resting = [weight for weight in head.parameters() if weight.requires_grad and weight is not embedding.weight]
    for weight in resting:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in resting:
            weight.requires_grad_(True)


def pairwise_loss(scores: Tensor, sizes: list[int]) -> Tensor:
    """Mean over rankings of the mean over their pairs of -log sigmoid(better - worse).

    `scores` [sum of sizes] holds the rankings one after the other, best answer first.
    """
    return torch.stack([-F.logsigmoid(_margins(ranking)).mean() for ranking in scores.split(sizes)]).mean()


def evaluate(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]], batch_size: int
) -> dict[str, float]:
    """`ranking_metrics` of the examples."""
    scores = scores_of_examples(model, tokenizer, examples, batch_size)
    return ranking_metrics(scores, [len(example["sequences"]) for example in examples])


def ranking_metrics(scores: Tensor, sizes: list[int]) -> dict[str, float]:
    """What held-out rankings say of a reward model, whatever it was trained by.

    `accuracy`: share of answer pairs in the right order; `margin`: mean score difference; `pairwise_loss`: see there.
    """
    margins = torch.cat([_margins(ranking) for ranking in scores.split(sizes)])
    return {
        "accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
        "pairwise_loss": pairwise_loss(scores, sizes).item(),
    }


def scores_of_examples(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]], batch_size: int
) -> Tensor:
    """Scores of all answers, ranking after ranking."""
    sequences = [sequence for example in examples for sequence in example["sequences"]]
    return scores_of(model, sequences, tokenizer.pad_token_id, batch_size)


@torch.no_grad()
def scores_of(model: RewardModel, sequences: list[list[int]], pad_id: int, batch_size: int) -> Tensor:
    """Scores [n] (float32, on the CPU) of token sequences, in their order; batched by length to pad little."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = padded([sequences[index] for index in chosen], pad_id)
        scores[chosen] = model(**{key: value.to(model.backbone.device) for key, value in batch.items()}).float().cpu()
    return scores


def load(model: PreTrainedModel, folder: Path) -> RewardModel:
    """The reward model of `folder`, for scoring, on `model`: what it stands on, or itself where it is a whole model."""
    method = methods.method_of(folder)
    if method == "lora":
        return RewardModel(load_lora(model, folder), load_score(folder)).eval()
    return RewardModel(model if method == "full" else methods.apply(model, folder), load_score(folder)).eval()


def _margins(ranking: Tensor) -> Tensor:
    """Score differences better - worse of all pairs of one ranking, best first."""
    better, worse = torch.triu_indices(len(ranking), len(ranking), offset=1)
    return ranking[better] - ranking[worse]
