"""Reward model: a LoRA and a scalar head that give the better answer the higher score.

The score of a sequence is the head's value at its last token, the answer's end. The loss is the pairwise logistic one,
-log sigmoid(r_better - r_worse), averaged over the pairs of each ranking (Ouyang et al. 2022, eq. 1), by a logsigmoid
that does not underflow.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from glm.config import Reward, Sft
from glm.data.collate import PairCollator, pad_ids
from glm.models.adapters import add_lora, last_hidden, load_lora, load_score, save_lora, save_score, trainable_count
from glm.training.trainer import Log, Progress, TrainerLog, require_rows, training_arguments


class RewardModel(nn.Module):
    """A causal LM's backbone under an adapter, and a head Linear(hidden → 1) in float32."""

    def __init__(self, backbone: PeftModel, score: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.score = score.to(backbone.device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Scores [batch] of right-padded sequences [batch, length]."""
        hidden = last_hidden(self.backbone, input_ids, attention_mask)
        last = attention_mask.sum(-1) - 1
        return self.score(hidden[torch.arange(len(last)), last].float()).squeeze(-1)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Sequence[dict[str, Any]],
    dev_set: Sequence[dict[str, Any]],
    params: Reward,
    *,
    lora: Sft,
    sft_adapter: Path | None,
    seed: int,
    log: Log,
    progress: Progress,
) -> tuple[RewardModel, dict[str, float]]:
    """Train on examples of `sequences` (token ids of prompt + answer, best answer first).

    The LoRA starts as a copy of `sft_adapter`, or fresh with the shape of `lora` where that is None; the head starts at
    zero, so that the first scores are all 0 and the first loss is log 2. Returns the model and `accuracy`, `margin`,
    `eval_loss` on `dev_set` (`*_before` for the untrained one), `train_loss`, `steps`, `trainable_parameters`,
    `trainable_percent`.

    Raises:
        InputError: no training rows, or a LoRA target that the model does not have.
        FloatingPointError: the loss became NaN or infinite.
    """
    require_rows(train_set, "reward")
    backbone = load_lora(model, sft_adapter, trainable=True) if sft_adapter else add_lora(model, lora)
    score = nn.Linear(model.config.hidden_size, 1, bias=False)
    nn.init.zeros_(score.weight)
    reward_model = RewardModel(backbone, score)
    trained, total = trainable_count(reward_model)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _RewardTrainer(
            model=reward_model,
            args=training_arguments(params, scratch, seed, has_dev=bool(dev_set), label_name="sizes"),
            train_dataset=train_set,
            eval_dataset=dev_set or None,
            data_collator=PairCollator(tokenizer.pad_token_id),
            callbacks=[TrainerLog(log, progress)],
        )
        result = trainer.train()
    numbers = {
        "train_loss": result.training_loss,
        "steps": result.global_step,
        "trainable_parameters": trained,
        "trainable_percent": 100 * trained / total,
    }
    if dev_set:
        numbers |= evaluate(reward_model.eval(), tokenizer, dev_set, params.per_device_eval_batch_size)
    return reward_model, numbers


def pairwise_loss(scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mean over rankings of the mean over their pairs of -log sigmoid(better - worse).

    `scores` [sum of sizes] holds the rankings one after the other, best answer first.
    """
    return torch.stack([-F.logsigmoid(_margins(ranking)).mean() for ranking in scores.split(sizes.tolist())]).mean()


def evaluate(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]], batch_size: int
) -> dict[str, float]:
    """`ranking_metrics` of the examples."""
    scores = scores_of_examples(model, tokenizer, examples, batch_size)
    return ranking_metrics(scores, [len(example["sequences"]) for example in examples])


def ranking_metrics(scores: torch.Tensor, sizes: list[int]) -> dict[str, float]:
    """`accuracy` (share of answer pairs in the right order), `margin` (mean score difference), `eval_loss`."""
    margins = torch.cat([_margins(ranking) for ranking in scores.split(sizes)])
    return {
        "accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
        "eval_loss": pairwise_loss(scores, torch.tensor(sizes)).item(),
    }


def scores_of_examples(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]], batch_size: int
) -> torch.Tensor:
    """Scores of all answers, ranking after ranking."""
    sequences = [sequence for example in examples for sequence in example["sequences"]]
    return scores_of(model, sequences, tokenizer.pad_token_id, batch_size)


@torch.no_grad()
def scores_of(model: RewardModel, sequences: list[list[int]], pad_id: int, batch_size: int) -> torch.Tensor:
    """Scores [n] (float32, on the CPU) of token sequences, in their order; batched by length to pad little."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_ids([sequences[index] for index in chosen], pad_id, "right")
        scores[chosen] = model(**{key: value.to(model.backbone.device) for key, value in batch.items()}).float().cpu()
    return scores


def save(model: RewardModel, folder: Path, base: str) -> None:
    """Write adapter and head into the existing `folder`, loadable by PEFT as a sequence classifier."""
    save_lora(model.backbone, folder, base)
    save_score(folder, model.score)


def load(model: PreTrainedModel, folder: Path) -> RewardModel:
    """The reward model of `folder` on a fresh base `model`, for scoring."""
    return RewardModel(load_lora(model, folder), load_score(folder)).eval()


def _margins(ranking: torch.Tensor) -> torch.Tensor:
    """Score differences better - worse of all pairs of one ranking, best first."""
    better, worse = torch.triu_indices(len(ranking), len(ranking), offset=1)
    return ranking[better] - ranking[worse]


class _RewardTrainer(Trainer):
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sizes = inputs["sizes"]
        scores = model(inputs["input_ids"], inputs["attention_mask"])
        loss = pairwise_loss(scores, sizes)
        return (loss, {"scores": scores}) if return_outputs else loss
