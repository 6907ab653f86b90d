"""TRL's trainers on our actors: what KTO, GRPO and RLOO share.

TRL brings the loss and the loop; data, tokens, rollouts (our decoder), rewards, looks at held-out prompts and the
numbers in the curves are ours. It trains the adapter "policy" on the one base, and compares with "ref", a copy of it as
it was. A killed run goes on from the Trainer's own checkpoint.

Of several processes each computes its share of a batch, and DDP takes the mean of the gradients. All have torch's
generators in the same state, so that answers and their split into parts do not depend on how many there are.
"""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from glm.config import Rival
from glm.training.actors import Actors
from glm.training.checkpoint import Checkpoints, rng_state, set_rng_state
from glm.training.distributed import from_first, rank
from glm.training.policy_eval import Show, Watch
from glm.training.trainer import Log, Progress

POLICY = "policy.pt"  # in a checkpoint's folder: the adapter
RNG = "rng_state.pt"  # there too: the generators, which are the same in all processes
STATE = "policy_eval.pt"  # there too, written last: the first look and the curves so far


def arguments(params: Rival, folder: Path, seed: int) -> dict[str, Any]:
    """Our parameters in the Trainer's words; `per_device_train_batch_size` is the algorithm's own."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "learning_rate": params.learning_rate,
        "lr_scheduler_type": params.lr_scheduler_type,
        "warmup_steps": params.warmup_steps,
        "max_steps": params.max_steps,
        "max_grad_norm": params.max_grad_norm,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": params.save_steps,
        "save_total_limit": 2,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "ddp_find_unused_parameters": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


@torch.no_grad()
def prepare(actors: Actors, make_trainer: "Callable[[Path], PolicyCheckpoints]", folder: Path) -> "PolicyCheckpoints":
    """A trainer whose reference, TRL's adapter "ref", is the policy as it is now.

    TRL wants the adapter that it trains to be called "default", to make "ref" like it and to copy its weights. It finds
    the policy under that name, and the copying is done here.
    """
    actors.leave_layers_alone()
    actors.use("policy")
    actors.model.set_adapter("policy")  # where TRL comes back to after a look at the reference
    configs = actors.model.peft_config
    configs["default"] = configs["policy"]
    trainer = make_trainer(folder)
    trainer.actors = actors
    del configs["default"]
    for name, parameter in actors.policy.items():
        actors.model.get_parameter(name.replace(".policy.", ".ref.")).copy_(parameter)
    set_seed(trainer.args.seed)  # GRPO's and RLOO's trainers have given each process another one
    return trainer


class PolicyCheckpoints(Trainer):
    """Keeps the policy adapter alone in a checkpoint, not base, reference and reward beside it."""

    actors: Actors  # set by `prepare`

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.actors.policy_state(), folder / POLICY)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint, POLICY)
        self.actors.load_policy_state(torch.load(path, map_location="cpu", weights_only=True))

    # The Trainer would keep a file for each process, which another number of them could not go on from.

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            torch.save(rng_state(), Path(output_dir, RNG))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_rng_state(torch.load(Path(checkpoint, RNG), map_location="cpu", weights_only=True))


def run(
    make_trainer: Callable[[Path], PolicyCheckpoints],
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    dev_prompts: list[list[int]],
    params: Rival,
    names: dict[str, str],
    *,
    seed: int,
    log: Log,
    progress: Progress,
    log_speed: Log | None = None,
    show: Show | None = None,
    checkpoints: Checkpoints,
) -> dict[str, float]:
    """Train with the trainer that `make_trainer` makes, given the folder of its checkpoints.

    `names` says which numbers of the trainer's log are curves, and their names there. The rest is as in
    `policy_loop.run`: looks every `eval_steps`, the same numbers returned, and a killed run goes on where it was.

    Raises:
        InputError: no dev prompts.
        FloatingPointError: the loss became NaN or infinite.
    """
    watch = Watch(actors, tokenizer, dev_prompts, params, seed=seed, log=log, show=show)
    last = last_checkpoint(checkpoints.folder)
    if last:
        watch.restore(torch.load(Path(last, STATE), weights_only=True))
    trainer = prepare(actors, make_trainer, checkpoints.folder)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Numbers(watch, params, names, progress, log_speed))
    result = trainer.train(resume_from_checkpoint=last)
    actors.use("policy")
    return {"steps": result.global_step, **watch.result()}


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in `folder`. The first process removes one that was being written when it ended."""
    last = None
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        last = get_last_checkpoint(str(folder))
        if last and not Path(last, STATE).exists():
            shutil.rmtree(last)
            last = get_last_checkpoint(str(folder))
    return from_first(last)


class _Numbers(TrainerCallback):
    """Hands the trainer's numbers to `watch`, has it look, and keeps its state beside every checkpoint."""

    def __init__(
        self, watch: Watch, params: Rival, names: dict[str, str], progress: Progress, log_speed: Log | None
    ) -> None:
        self.watch = watch
        self.params = params
        self.names = names
        self.progress = progress
        self.log_speed = log_speed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.watch.before:
            self.watch.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        step = state.global_step
        values = {ours: float(logs[name]) for name, ours in self.names.items() if logs.get(name) is not None}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"loss is {values['loss']} at step {step}: lower the learning rate")
        if self.log_speed and "step_time" in logs:
            self.log_speed(step, {"learn_seconds": float(logs["step_time"])})
        if step % self.params.eval_steps == 0 or step == state.max_steps:
            values |= self.watch.look(step)
        self.watch.record(step, values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not args.should_save:
            return
        target = Path(args.output_dir, f"checkpoint-{state.global_step}", STATE)
        temporary = target.with_suffix(".part")
        torch.save(self.watch.state(), temporary)
        os.replace(temporary, target)
