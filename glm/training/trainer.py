"""What SFT and reward model share: transformers' Trainer, how a step is computed, and how its numbers come out.

The Trainer stays, for its optimizer, schedule, logging and the launchers that it knows; it costs under 1 % of a step of
a 6B model. What is ours: one batch of its loader is one optimizer step, which the collator cuts into micro-batches.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm.config import Training
from glm.errors import InputError
from glm.models.adapters import trainable_count
from glm.models.chatglm1 import ChatGLMConfig
from glm.models.packed_attention import packed_implementation, why_not_packed
from glm.training.layers import Checkpointing, choose_checkpointing
from glm.training.packing import Packing, pack_dataset

Log = Callable[[int, dict[str, float]], None]  # (optimizer step, values)
Progress = Callable[[int, int], None]  # (steps done, steps in all)
Example = dict[str, Any]
Sequences = Callable[[Example], list[list[int]]]  # the token sequences of an example: one for SFT, all of a ranking

ROW_MULTIPLE = 256  # compiled rows come in multiples of so many tokens
COMPILE_TOKENS = 2_000_000  # trained tokens from which half a minute of compiling pays on a 6B model
USABLE_MEMORY = 0.92  # of what is free: fragments, and what the libraries take for themselves

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How steps are computed, decided once per run. It changes speed and memory, not results.

    `train_set` holds examples, or with `tokens_per_step` rows of examples; `step_size` of them are an optimizer step.
    """

    train_set: Sequence[Any]
    step_size: int
    packing: Packing | None
    attention: str | None  # of packed rows, as transformers calls it
    compiled: bool
    checkpointing: Checkpointing


def plan(
    model: PeftModel, examples: Sequence[Example], sequences: Sequences, params: Training, *, stage: str, seed: int
) -> Plan:
    """Decide on packing, compiling and checkpointing for training `model` on `examples`, and log the choice."""
    base = model.get_base_model()
    on_gpu = base.device.type == "cuda"
    lengths = [len(sequence) for example in examples for sequence in sequences(example)]
    step_size = params.per_device_train_batch_size * params.gradient_accumulation_steps
    run_tokens = sum(lengths) * params.num_train_epochs
    if params.max_steps > 0:
        run_tokens = params.max_steps * (params.tokens_per_step or step_size * sum(lengths) / len(examples))

    attention = packed_implementation(base, params.attn_implementation)
    obstacle = "packing: false" if not params.packing else why_not_packed(base, attention)
    if obstacle and params.tokens_per_step:
        raise InputError(f"{stage}.tokens_per_step {params.tokens_per_step} needs packed rows: {obstacle}")
    compiled = params.torch_compile
    if compiled == "auto":
        compiled = on_gpu and obstacle is None and run_tokens >= COMPILE_TOKENS

    train_set: Sequence[Any] = examples
    packing = None
    if obstacle is None:
        row = min(params.tokens_per_forward, params.tokens_per_step or params.tokens_per_forward)
        per_step = step_size * max(len(sequences(example)) for example in examples)
        most = min(per_step, row // min(lengths))
        if params.tokens_per_step:
            train_set = pack_dataset(list(examples), lambda example: sum(map(len, sequences(example))), row, seed)
            step_size = params.tokens_per_step // row
            most = max(sum(len(sequences(example)) for example in filled) for filled in train_set)
        prefix_lm = base.config if isinstance(base.config, ChatGLMConfig) else None
        packing = Packing(row, ROW_MULTIPLE if compiled else 1, most, max(lengths), prefix_lm)
        tokens = max(row, max(lengths))
    else:
        tokens = params.per_device_train_batch_size * max(lengths)

    checkpointing = params.activation_checkpointing
    if checkpointing == "auto":
        trained, _ = trainable_count(model)
        checkpointing = (
            choose_checkpointing(base, tokens, trained, compiled=compiled, free=_free_memory()) if on_gpu else "none"
        )
    found = Plan(train_set, step_size, packing, None if obstacle else attention, compiled, checkpointing)
    logger.info("%s: %s", stage, _in_words(found, len(examples), sum(lengths), obstacle))
    return found


def training_arguments(params: Training, plan: Plan, output_dir: str | Path, seed: int, *, has_dev: bool) -> Any:
    """The stage's parameters in the Trainer's words. Nothing is reported anywhere but through `TrainerLog`."""
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output_dir),
        seed=seed,
        data_seed=seed,
        learning_rate=params.learning_rate,
        num_train_epochs=params.num_train_epochs,
        max_steps=params.max_steps,
        per_device_train_batch_size=plan.step_size,
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_steps,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=params.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        eval_strategy="steps" if has_dev else "no",
        eval_steps=params.eval_steps,
        eval_on_start=has_dev,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # else the copy of a batch waits for the step before
        use_cpu=not on_gpu,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


class StepTrainer(Trainer):
    """A Trainer for a `model` that maps a micro-batch to the sum of its losses.

    The collator gives for a step's examples {"micro_batches": [inputs of the model, …], "items": what the sum is
    divided by, "tokens": real ones, "examples"}. Packing takes a millisecond a step, which the GPU's queue hides: no
    loader processes. `log_speed` gets tokens and examples per second and the peak of the GPU's memory.
    """

    def __init__(self, *, eval_batch_size: int, log_speed: Log, **options: Any) -> None:
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self.eval_batch_size = eval_batch_size
        self.log_speed = log_speed
        self.seen = {"tokens": 0, "examples": 0}
        self._window: tuple[float, dict[str, int]] | None = None  # clock and `seen` where the present window began

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        model.train()
        total = torch.zeros((), device=self.args.device)
        for micro_batch in inputs["micro_batches"]:
            loss = model(**self._prepare_inputs(micro_batch)) / inputs["items"]
            self.accelerator.backward(loss)
            total += loss.detach()
        for name in self.seen:
            self.seen[name] += inputs[name]
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" not in logs:
            return
        now = time.monotonic()  # the loss was read, so that the GPU is done with the window's steps
        if self._window is not None:
            seconds = now - self._window[0]
            speeds = {f"{name}_per_second": (self.seen[name] - self._window[1][name]) / seconds for name in self.seen}
            if torch.cuda.is_available():
                speeds["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.log_speed(self.state.global_step, speeds)
        self._window = now, dict(self.seen)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all items of the dev set, each counting the same, whatever its batch."""
        self.model.eval()
        total, items = 0.0, 0
        with torch.compiler.set_stance("force_eager"):  # not worth compiling a second time
            for start in range(0, len(self.eval_dataset), self.eval_batch_size):
                batch = self.data_collator(self.eval_dataset[start : start + self.eval_batch_size])
                total += sum(self.model(**self._prepare_inputs(part)).item() for part in batch["micro_batches"])
                items += batch["items"]
        metrics = {"eval_loss": total / items}
        self.log(metrics)
        self._window = None  # looking at the dev set is no training
        return metrics


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


def _free_memory() -> int:
    """Bytes of GPU memory that this process can still get."""
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    allowed = int(torch.cuda.memory.get_per_process_memory_fraction() * total) - reserved
    return int(USABLE_MEMORY * (min(free, allowed) + reserved - torch.cuda.memory_allocated()))


def _in_words(plan: Plan, examples: int, tokens: int, obstacle: str | None) -> str:
    unit = "examples"
    if plan.packing is None:
        layout = f"padded ({obstacle})"
    elif plan.train_set and isinstance(plan.train_set[0], list):
        unit = f"rows, about {examples * plan.step_size / len(plan.train_set):.0f} examples"
        fill = 100 * tokens / len(plan.train_set) / plan.packing.tokens_per_row
        layout = f"packed, {len(plan.train_set)} rows of {plan.packing.tokens_per_row} tokens, {fill:.1f} % filled"
    else:
        layout = f"packed, rows of at most {plan.packing.tokens_per_row} tokens"
    steps = -(-len(plan.train_set) // plan.step_size)
    return (
        f"{examples} examples of {tokens / examples:.0f} tokens; {layout}; {steps} steps an epoch of {plan.step_size} "
        f"{unit}; attention {plan.attention or 'as loaded'}; torch_compile {str(plan.compiled).lower()}; "
        f"activation_checkpointing {plan.checkpointing}"
    )
