"""What SFT and reward model share: the set-up of transformers' Trainer and the way its numbers come out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm.config import Training
from glm.errors import InputError

Log = Callable[[int, dict[str, float]], None]  # (optimizer step, values)
Progress = Callable[[int, int], None]  # (steps done, steps in all)


def training_arguments(
    params: Training, output_dir: str | Path, seed: int, *, has_dev: bool, label_name: str = "labels"
) -> TrainingArguments:
    """The stage's parameters in the Trainer's words. Nothing is reported anywhere but through `TrainerLog`.

    `label_name` is the batch's entry without which there is no loss to compute.
    """
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output_dir),
        seed=seed,
        data_seed=seed,
        learning_rate=params.learning_rate,
        num_train_epochs=params.num_train_epochs,
        max_steps=params.max_steps,
        per_device_train_batch_size=params.per_device_train_batch_size,
        per_device_eval_batch_size=params.per_device_eval_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_steps,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        logging_steps=params.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        eval_strategy="steps" if has_dev else "no",
        eval_steps=params.eval_steps,
        eval_on_start=has_dev,
        prediction_loss_only=True,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=[label_name],
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


class TrainerLog(TrainerCallback):
    """Hands the Trainer's numbers to `log` and its steps to `progress`, and stops on a loss that is not a number."""

    def __init__(self, log: Log, progress: Progress) -> None:
        self.log = log
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        values = {
            key: float(value)
            for key, value in (logs or {}).items()
            if key in ("loss", "grad_norm", "learning_rate", "eval_loss")
        }
        for name in ("loss", "eval_loss"):
            if name in values and not torch.isfinite(torch.tensor(values[name])):
                raise FloatingPointError(
                    f"{name} is {values[name]} at step {state.global_step}: lower the learning rate"
                )
        if values:
            self.log(state.global_step, values)


def require_rows(rows: Sequence[Any], what: str) -> None:
    """Raise an InputError where a stage would start without data."""
    if not rows:
        raise InputError(f"no {what} rows to train on")
