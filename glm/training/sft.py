"""Supervised fine-tuning: next-token loss on the answers of a dialogue."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.config import Sft, Strategy
from glm.data.collate import pad, pad_ids
from glm.data.encode import IGNORED
from glm.errors import InputError
from glm.models import methods
from glm.models.adapters import causal_lm, half_precision, trainable_count
from glm.models.methods import Tunable
from glm.training.fused_layer import hidden_at
from glm.training.guards import say_what_comes
from glm.training.loss import cross_entropy_sum, label_positions
from glm.training.make_trainer import Surroundings, trainer_for
from glm.training.packing import Packing, packed_row, step_rows
from glm.training.plan import plan
from glm.training.trainer import require_rows


class SftLoss(nn.Module):
    """Maps a micro-batch of `SftCollator` to the sum of its next-token losses.

    `fused`: the model's layers are, and give only what is asked for. `compiled`: the loss is, as the layers are.

    Raises InputError for the models whose logits are not simply their head's output.
    """

    def __init__(
        self,
        model: Tunable,
        neftune_noise_alpha: float | None = None,
        *,
        fused: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1.0):
                raise InputError(f"{name} {getattr(model.config, name)} in the model's config.json is not supported")
        self.model = model
        self.neftune_noise_alpha = neftune_noise_alpha
        self.fused = fused
        self.compiled = compiled

    def forward(self, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        alpha = self.neftune_noise_alpha if self.training else None
        with noisy_embeddings(causal_lm(self.model), alpha, inputs):
            hidden = hidden_at(self.model, positions, fused=self.fused, **inputs)
        with half_precision(self.model):
            head, vocabulary = self.model.get_output_embeddings(), self.model.config.vocab_size
            return cross_entropy_sum(hidden, head, targets, vocabulary, compiled=self.compiled, fused=self.fused)


@contextmanager
def noisy_embeddings(model: PreTrainedModel, alpha: float | None, inputs: dict[str, Any]) -> Iterator[None]:
    """Inside, embeddings are uniformly noisy: ± alpha / sqrt(length * width) (NEFTune, Jain et al. 2023).

    The length is that of a token's own sequence, also in packed rows and beside padding.
    """
    if alpha is None:
        yield
        return
    if "cu_seq_lens_q" in inputs:
        lengths = inputs["cu_seq_lens_q"].diff()
        of_token = lengths.repeat_interleave(lengths)[None]
    else:
        of_token = inputs["attention_mask"].sum(-1, keepdim=True)

    def add_noise(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        size = alpha / (of_token * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size[..., None].to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


class SftCollator:
    """Examples of `input_ids` and `labels` → the micro-batches of a step, packed or padded, and its label tokens.

    Packed, it also takes rows, lists of examples that `glm.data.packing` put together.
    """

    def __init__(self, pad_id: int, packing: Packing | None, micro_batch_size: int) -> None:
        self.pad_id = pad_id
        self.packing = packing
        self.micro_batch_size = micro_batch_size

    def __call__(self, step: list[Any]) -> dict[str, Any]:
        rows = step_rows(step, self.packing, self.micro_batch_size)
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
    start: Path | None = None,
    strategy: Strategy = "ddp",
    **surroundings: Unpack[Surroundings],
) -> tuple[Tunable, dict[str, float]]:
    """Train `model` by `params.method` on examples of `input_ids` and `labels`; returns it with the run's numbers.

    What is trained starts fresh, or as a copy of the folder `start`. The numbers: `train_loss` (mean over all steps),
    `eval_loss_before` and `eval_loss` (nats a label token on `dev_set`, before the first and after the last step),
    `steps`, `trainable_parameters`, `trainable_percent`. With `checkpoints` a killed run goes on, see `StepTrainer`.

    Raises:
        InputError: no training rows, or something is to be trained that the model does not have.
        FloatingPointError: the loss became NaN, infinite or zero.
    """
    require_rows(train_set, "SFT")
    tuned = methods.start(model, params.method, params, start)
    trained, total = trainable_count(tuned)
    options: dict[str, Any] = {"stage": "sft", "seed": seed, "strategy": strategy}
    steps = plan(tuned, train_set, lambda example: [example["input_ids"]], params, **options)
    say_what_comes(tuned, params.method, params, steps, stage="sft")
    loss = SftLoss(tuned, params.neftune_noise_alpha, fused=steps.fused, compiled=steps.compiled)
    collator = SftCollator(tokenizer.pad_token_id, steps.packing, params.per_device_train_batch_size)
    with trainer_for(loss, collator, dev_set, params, steps, seed=seed, **surroundings) as trainer:
        trainer.run()
        after = trainer.evaluate()["eval_loss"] if dev_set else None
    methods.finish(tuned, params.method)
    numbers = {
        "train_loss": trainer.train_loss,
        "steps": trainer.state.global_step,
        "trainable_parameters": trained,
        "trainable_percent": 100 * trained / total,
    }
    if after is not None:
        before = next(values["eval_loss"] for _, values in trainer.curves if "eval_loss" in values)
        numbers |= {"eval_loss_before": before, "eval_loss": after}
    return tuned, numbers


@torch.no_grad()
def mean_loss(
    model: Tunable,
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
