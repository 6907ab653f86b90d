"""Supervised fine-tuning: next-token loss on the answers of a dialogue.

Left out here: checkpoints and resume, methods other than LoRA.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.config import Sft
from glm.data.collate import pad, pad_ids
from glm.data.encode import IGNORED
from glm.errors import InputError
from glm.models.adapters import add_lora, last_hidden, trainable_count
from glm.models.packed_attention import attention_of
from glm.training.layers import layers_run
from glm.training.loss import cross_entropy_sum, label_positions
from glm.training.packing import Packing, packed_row, step_rows
from glm.training.trainer import Log, Progress, StepTrainer, TrainerLog, plan, require_rows, training_arguments


class SftLoss(nn.Module):
    """Maps a micro-batch of `SftCollator` to the sum of its next-token losses.

    Raises InputError for the models whose logits are not simply their head's output.
    """

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        super().__init__()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1.0):
                raise InputError(f"{name} {getattr(model.config, name)} in the model's config.json is not supported")
        self.model = model

    def forward(self, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        hidden = last_hidden(self.model, **inputs).flatten(0, 1)[positions]
        return cross_entropy_sum(hidden, self.model.get_output_embeddings(), targets, self.model.config.vocab_size)


class SftCollator:
    """Examples of `input_ids` and `labels` → the micro-batches of a step, packed or padded, and its label tokens.

    Packed, it also takes rows, lists of examples that `pack_dataset` put together.
    """

    def __init__(self, pad_id: int, packing: Packing | None, micro_batch_size: int) -> None:
        self.pad_id = pad_id
        self.packing = packing
        self.micro_batch_size = micro_batch_size

    def __call__(self, step: list[Any]) -> dict[str, Any]:
        rows = step_rows(step, self.packing, self.micro_batch_size, lambda example: len(example["input_ids"]))
        parts = [self._inputs(row) for row in rows]
        return {
            "micro_batches": parts,
            "items": sum(len(part["targets"]) for part in parts),
            "tokens": sum(len(example["input_ids"]) for row in rows for example in row),
            "examples": sum(map(len, rows)),
        }

    def _inputs(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [example["input_ids"] for example in examples]
        if self.packing is None:
            labels = pad([example["labels"] for example in examples], IGNORED, "right")
            return {**pad_ids(sequences, self.pad_id, "right"), **label_positions(labels)}
        # The first token of an example is predicted by nothing, least of all by the end of the one before.
        labels = torch.tensor([[label for example in examples for label in [IGNORED, *example["labels"][1:]]]])
        return {**packed_row(sequences, self.packing, self.pad_id), **label_positions(labels)}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Sequence[dict[str, Any]],
    dev_set: Sequence[dict[str, Any]],
    params: Sft,
    *,
    seed: int,
    log: Log,
    log_speed: Log,
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
    steps = plan(adapted, train_set, lambda example: [example["input_ids"]], params, stage="sft", seed=seed)
    with (
        tempfile.TemporaryDirectory() as scratch,
        attention_of(model, steps.attention),
        layers_run(model, compiled=steps.compiled, checkpointing=steps.checkpointing),
    ):
        trainer = StepTrainer(
            model=SftLoss(adapted),
            args=training_arguments(params, steps, scratch, seed, has_dev=bool(dev_set)),
            train_dataset=steps.train_set,
            eval_dataset=dev_set or None,
            eval_batch_size=params.per_device_eval_batch_size,
            data_collator=SftCollator(tokenizer.pad_token_id, steps.packing, params.per_device_train_batch_size),
            callbacks=[TrainerLog(log, progress)],
            log_speed=log_speed,
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
    loss = SftLoss(model)
    collate = SftCollator(tokenizer.pad_token_id, None, batch_size)
    batch = collate(list(examples))
    parts = ({name: value.to(model.device) for name, value in part.items()} for part in batch["micro_batches"])
    return sum(loss(**part).item() for part in parts) / batch["items"]
