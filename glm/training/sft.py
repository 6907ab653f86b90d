"""Supervised fine-tuning: next-token loss on the answers of a dialogue.

Left out here: checkpoints and resume, packing, methods other than LoRA.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from glm.config import Sft
from glm.data.collate import SftCollator
from glm.models.adapters import add_lora, trainable_count
from glm.training.trainer import Log, Progress, TrainerLog, require_rows, training_arguments


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Sequence[dict[str, Any]],
    dev_set: Sequence[dict[str, Any]],
    params: Sft,
    *,
    seed: int,
    log: Log,
    progress: Progress,
) -> tuple[PeftModel, dict[str, float]]:
    """Train a fresh LoRA on examples of `input_ids` and `labels`, and return it with the run's numbers.

    The numbers: `train_loss` (mean over all steps), `eval_loss_before` and `eval_loss` (nats a label token on
    `dev_set`, before the first and after the last step), `steps`, `trainable_parameters`, `trainable_percent`.

    Raises:
        InputError: no training rows, or a LoRA target that the model does not have.
        FloatingPointError: the loss became NaN or infinite.
    """
    require_rows(train_set, "SFT")
    adapted = add_lora(model, params)
    trained, total = trainable_count(adapted)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=adapted,
            args=training_arguments(params, scratch, seed, has_dev=bool(dev_set)),
            train_dataset=train_set,
            eval_dataset=dev_set or None,
            data_collator=SftCollator(tokenizer.pad_token_id),
            callbacks=[TrainerLog(log, progress)],
        )
        before = trainer.evaluate()["eval_loss"] if dev_set else None
        result = trainer.train()
        after = trainer.evaluate()["eval_loss"] if dev_set else None
    numbers = {
        "train_loss": result.training_loss,
        "steps": result.global_step,
        "trainable_parameters": trained,
        "trainable_percent": 100 * trained / total,
    }
    if before is not None and after is not None:
        numbers |= {"eval_loss_before": before, "eval_loss": after}
    return adapted, numbers


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    batch_size: int,
) -> float:
    """Mean next-token loss in nats a label token over `examples`; every token counts the same, whatever its batch."""
    collate = SftCollator(tokenizer.pad_token_id)
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        rows = list(examples[start : start + batch_size])
        batch = {key: value.to(model.device) for key, value in collate(rows).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        tokens += int((labels != -100).sum())
    return total / tokens
