"""TRL's trainers on our actors: what KTO, GRPO and RLOO share.

TRL brings the loss and the loop; data, tokens, rollouts (our decoder), rewards, looks at held-out prompts and the
numbers in the curves are ours. It trains the adapter "policy" on the one base, and compares with "ref", a copy of it as
it was. A killed run goes on from the Trainer's own checkpoint.
"""

import math
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
)
from transformers.trainer_utils import get_last_checkpoint

from glm.config import Grouped, Rival
from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.checkpoint import Checkpoints
from glm.training.policy_eval import Show, Watch
from glm.training.policy_loop import batch_at
from glm.training.trainer import Log, Progress

POLICY = "policy.pt"  # in a checkpoint's folder: the adapter
STATE = "policy_eval.pt"  # in a checkpoint's folder: the first look and the curves so far
ONLINE_NAMES = {  # what GRPO's and RLOO's trainers log, and its name in our curves
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "reward": "reward",
    "reward_std": "reward_std",
    "kl": "kl_per_token",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_fraction",
    "completions/mean_length": "response_length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "zero_spread",
}


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
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


def online_arguments(params: Grouped) -> dict[str, Any]:
    """What GRPO and RLOO have in common: one batch of prompts with their answers is one optimizer step."""
    parts = params.gradient_accumulation_steps
    return {
        "per_device_train_batch_size": params.batch_size * params.num_generations // parts,
        "gradient_accumulation_steps": parts,
        "steps_per_generation": parts,
        "num_generations": params.num_generations,
        "num_iterations": params.num_iterations,
        "beta": params.beta,
        "epsilon": params.epsilon,
        "max_completion_length": params.max_new_tokens,
        "temperature": params.temperature,
        "shuffle_dataset": False,  # see online_inputs
    }


def online_inputs(
    actors: Actors, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], params: Grouped, seed: int
) -> dict[str, Any]:
    """Model, rewards and data of GRPO's and RLOO's trainers.

    The prompts of all steps come one after the other: TRL's own order is not found again after a break.
    """
    from datasets import Dataset

    batches = range(1, -(-params.max_steps // params.num_iterations) + 1)
    order = [index for batch in batches for index in batch_at(batch, len(prompts), params.batch_size, seed)]
    return {
        "model": actors.model,
        "reward_funcs": reward_function(actors, tokenizer),
        "train_dataset": Dataset.from_dict({"prompt": [prompts[index] for index in order]}),
        "processing_class": tokenizer,
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
    return trainer


class PolicyCheckpoints(Trainer):
    """Keeps the policy adapter alone in a checkpoint, not base, reference and reward beside it."""

    actors: Actors  # set by `prepare`

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.actors.policy_state(), folder / POLICY)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.actors.load_policy_state(torch.load(Path(resume_from_checkpoint, POLICY), weights_only=True))


class OnTokens(PolicyCheckpoints):
    """Takes prompts that are token ids as they are; TRL would apply the chat template and encode."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}


def reward_function(actors: Actors, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """The actors' reward of token-id prompts and answers, as TRL's trainers ask for it; the policy stays active."""

    def reward(prompts: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores: Tensor = actors.score(batch_of(prompts, completion_ids, actors.model.device))
        actors.use("policy")
        return scores.tolist()

    return reward


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
    folder = checkpoints.folder
    folder.mkdir(parents=True, exist_ok=True)
    last = get_last_checkpoint(str(folder))
    if last and not Path(last, STATE).exists():  # killed while it was being written
        shutil.rmtree(last)
        last = get_last_checkpoint(str(folder))

    if last:
        watch.restore(torch.load(Path(last, STATE), weights_only=True))
    trainer = prepare(actors, make_trainer, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Numbers(watch, params, names, progress, log_speed))
    result = trainer.train(resume_from_checkpoint=last)
    actors.use("policy")
    return {"steps": result.global_step, **watch.result()}


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
        torch.save(self.watch.state(), Path(args.output_dir, f"checkpoint-{state.global_step}", STATE))
