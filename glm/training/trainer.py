"""What SFT and reward model share: transformers' Trainer, how a step is computed, and how its numbers come out.

The Trainer stays, for its optimizer, schedule, logging and the launchers that it knows; it costs under 1 % of a step of
a 6B model. What is ours: one batch of its loader is one optimizer step, which the collator cuts into micro-batches.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from heapq import nlargest
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from glm.errors import InputError
from glm.models.methods import trained_parameters
from glm.training.checkpoint import Checkpoints, rng_state, set_rng_state
from glm.training.guards import LossWatch, check_gradients, peak_flops, try_largest
from glm.training.packing import token_count

Log = Callable[[int, dict[str, float]], None]  # (optimizer step, values)
Progress = Callable[[int, int], None]  # (steps done, steps in all)
Collator = Callable[[list[Any]], dict[str, Any]]  # see StepTrainer

GRADIENT_STEPS = 3  # within so many steps something of the adapter must have had a gradient


class StepTrainer(Trainer):
    """A Trainer for a `model` that maps a micro-batch to the sum of its losses.

    The collator gives for a step's examples {"micro_batches": [inputs of the model, …], "items": what the sum is
    divided by, "tokens": real ones that are computed, "examples"}, and has its `packing`. Packing takes a millisecond a
    step, which the GPU's queue hides: no loader processes. `log_speed` gets tokens and examples per second, the share
    of the GPU's operations that the layers used (`mfu`, from `flops` a token) and the peak of its memory.

    With `checkpoints` the state is saved every `save_steps`, and a training that finds one there goes on from it: on
    the CPU the result is bit for bit that of an unbroken run. Points logged before the break are logged again.
    """

    def __init__(
        self,
        *,
        eval_batch_size: int,
        log: Log,
        log_speed: Log,
        progress: Progress,
        checkpoints: Checkpoints | None,
        flops: float,
        loraplus_lr_ratio: float | None,
        **options: Any,
    ) -> None:
        super().__init__(callbacks=[_StepEnd(self, progress)], **options)
        self.remove_callback(PrinterCallback)
        self.eval_batch_size = eval_batch_size
        self.log_point = log
        self.log_speed = log_speed
        self.checkpoints = checkpoints
        self.flops = flops
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.watch = LossWatch(checkpoints.folder if checkpoints else Path(tempfile.gettempdir()))
        self.curves: list[tuple[int, dict[str, float]]] = []
        self.loss_of_all = torch.zeros((), device=self.args.device)  # sums over steps
        self.loss_since_log = torch.zeros((), device=self.args.device)
        self.steps_since_log = 0
        self.has_gradient = False
        self.resumed: dict[str, Any] = {}
        self.seen = {"tokens": 0, "examples": 0}
        self._window: tuple[float, dict[str, int]] | None = None  # clock and `seen` where the present window began

    def run(self) -> None:
        """Train, from the last checkpoint if there is one.

        Raises:
            FloatingPointError: a loss became NaN, infinite or zero; the batch is kept.
            RuntimeError: nothing but a reward head has a gradient.
            InputError: the largest batch does not fit the GPU.
        """
        found = self.checkpoints.latest() if self.checkpoints else None
        if found is None:
            if self.args.device.type == "cuda":
                self._try_largest()
            self.train()
            return
        _, self.resumed = found
        self.args.eval_on_start = False
        for step, values in self.resumed["curves"]:
            self._record(step, values)
        with tempfile.TemporaryDirectory() as folder:  # the Trainer reads its own state from a file
            Path(folder, TRAINER_STATE_NAME).write_text(self.resumed["trainer"], encoding="utf-8")
            self.train(resume_from_checkpoint=folder)

    @property
    def train_loss(self) -> float:
        """The mean over all steps."""
        return self.loss_of_all.item() / max(1, self.state.global_step)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()
        total = self._forward_backward(model, inputs)
        for name in self.seen:
            self.seen[name] += inputs[name]
        self.loss_of_all += total
        self.loss_since_log += total
        self.steps_since_log += 1
        self.watch.keep(self.state.global_step + 1, total, inputs["micro_batches"])
        self._see_a_gradient(model)
        return total

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Add the gradient of a step; returns its loss []."""
        total = torch.zeros((), device=self.args.device)
        for micro_batch in inputs["micro_batches"]:
            loss = model(**self._prepare_inputs(micro_batch)) / inputs["items"]
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.watch.look()
            logs["loss"] = self.loss_since_log.item() / self.steps_since_log
            self.loss_since_log.zero_()
            self.steps_since_log = 0
        super().log(logs, *args, **kwargs)
        values = {name: logs[name] for name in ("loss", "grad_norm", "learning_rate", "eval_loss") if name in logs}
        if values:
            self._record(self.state.global_step, {name: float(value) for name, value in values.items()})
        if "loss" in logs:
            self._log_speed()

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all items of the dev set, each counting the same, whatever its batch."""
        self.model.eval()
        total, items = 0.0, 0
        with torch.compiler.set_stance("force_eager"):  # not worth compiling a second time
            for start in range(0, len(self.eval_dataset), self.eval_batch_size):
                batch = self.data_collator(self.eval_dataset[start : start + self.eval_batch_size])
                total += self._loss_of(batch)
                items += batch["items"]
        metrics = {"eval_loss": total / items}
        self.log(metrics)
        self._window = None  # looking at the dev set is no training
        return metrics

    def _loss_of(self, batch: dict[str, Any]) -> float:
        return sum(self.model(**self._prepare_inputs(part)).item() for part in batch["micro_batches"])

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = create_loraplus_optimizer(
            self.model,
            optimizer_class,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def _record(self, step: int, values: dict[str, float]) -> None:
        self.curves.append((step, values))
        self.log_point(step, values)
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}: lower the learning rate")

    def _log_speed(self) -> None:
        now = time.monotonic()  # the loss was read, so that the GPU is done with the window's steps
        if self._window is not None:
            seconds = now - self._window[0]
            speeds = {f"{name}_per_second": (self.seen[name] - self._window[1][name]) / seconds for name in self.seen}
            if torch.cuda.is_available():
                speeds["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if (peak := peak_flops()) is not None:
                speeds["mfu"] = speeds["tokens_per_second"] * self.flops / peak
            self.log_speed(self.state.global_step, speeds)
        self._window = now, dict(self.seen)

    def _see_a_gradient(self, model: nn.Module) -> None:
        # LoRA's A has none in the first step, and behind a reward head that starts at zero nothing has.
        if self.has_gradient or self.state.global_step >= GRADIENT_STEPS:
            return
        self.has_gradient = check_gradients(model)
        if not self.has_gradient and self.state.global_step == GRADIENT_STEPS - 1:
            raise RuntimeError("what is to be trained has no gradient: it is not part of what the model computes")

    def _try_largest(self) -> None:
        size = partial(token_count, packing=self.data_collator.packing)
        largest = nlargest(self.args.per_device_train_batch_size, self.train_dataset, key=size)
        parts = self.data_collator(largest)["micro_batches"]
        part = max(parts, key=lambda inputs: inputs["input_ids"].numel())
        kept = rng_state()
        try_largest(self.model, self._prepare_inputs(part), list(trained_parameters(self.model).values()))
        set_rng_state(kept)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.checkpoints is None or self.state.global_step >= self.state.max_steps:
            return
        with tempfile.TemporaryDirectory() as folder:
            self.state.save_to_json(str(Path(folder, TRAINER_STATE_NAME)))
            trainer = Path(folder, TRAINER_STATE_NAME).read_text(encoding="utf-8")
        state = self._trained_state() | {
            "scheduler": self.lr_scheduler.state_dict(),
            "rng": rng_state(),
            "trainer": trainer,
            "curves": self.curves,
            "losses": (self.loss_of_all, self.loss_since_log, self.steps_since_log),
        }
        self.checkpoints.save(self.state.global_step, state)
        self._window = None  # nor is writing

    def _trained_state(self) -> dict[str, Any]:
        return {
            "trained": {name: parameter.detach() for name, parameter in trained_parameters(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
        }

    # The Trainer's own way back reads files that hold the whole model; here the state is at hand.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with torch.no_grad():
            for name, parameter in trained_parameters(self.model).items():
                parameter.copy_(self.resumed["trained"][name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.optimizer.load_state_dict(self.resumed["optimizer"])
        self.lr_scheduler.load_state_dict(self.resumed["scheduler"])
        of_all, since_log, self.steps_since_log = self.resumed["losses"]
        self.loss_of_all.copy_(of_all)
        self.loss_since_log.copy_(since_log)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_rng_state(self.resumed["rng"])


class _StepEnd(TrainerCallback):
    """Hands on how far the training is, and looks at the losses since the last log once it is over."""

    def __init__(self, trainer: StepTrainer, progress: Progress) -> None:
        self.trainer = trainer
        self.progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.watch.look()


def require_rows(rows: Sequence[Any], what: str) -> None:
    """Raise an InputError where a stage would start without data."""
    if not rows:
        raise InputError(f"no {what} rows to train on")
