"""The trainer of SFT and reward model: alone or one of several, with the stage's parameters and plan."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from glm.config import Reward, Sft, Training
from glm.models.packed_attention import attention_of
from glm.training.checkpoint import Checkpoints
from glm.training.distributed import world_size
from glm.training.fsdp import FsdpTrainer
from glm.training.guards import flops_per_token
from glm.training.layers import layers_run
from glm.training.plan import Plan
from glm.training.rank_trainer import RankTrainer, Share
from glm.training.sharding import lent
from glm.training.trainer import Collator, Log, Progress, StepTrainer
from glm.training.zero3 import Zero3Trainer


class Surroundings(TypedDict, total=False):
    """Where a training's points go and where it is kept: what SFT and reward model hand through to their trainer."""

    log: Required[Log]
    log_speed: Required[Log]
    progress: Required[Progress]
    checkpoints: Checkpoints | None


@contextmanager
def trainer_for(
    loss: nn.Module,
    collator: Collator,
    dev_set: Sequence[Any],
    params: Sft | Reward,
    plan: Plan,
    *,
    seed: int,
    **surroundings: Unpack[Surroundings],
) -> Iterator[StepTrainer]:
    """A trainer of `loss`; inside, the layers and the attention of its model are as planned.

    In one of several processes it is a `RankTrainer`, of the plan's strategy.
    """
    trainer_class: type[StepTrainer] = StepTrainer
    if world_size() > 1:
        trainer_class = {"ddp": RankTrainer, "fsdp": FsdpTrainer, "deepspeed_zero3": Zero3Trainer}[plan.strategy]
        collator = Share(collator, plan.packing)
        torch._dynamo.config.optimize_ddp = False  # layers are compiled one by one; there is no graph to cut in parts
    with lent(loss) if plan.holders > 1 else nullcontext(loss) as trained:
        causal = next(module for module in trained.modules() if isinstance(module, PreTrainedModel))
        with (
            tempfile.TemporaryDirectory() as scratch,
            attention_of(causal, plan.attention),
            layers_run(causal, compiled=plan.compiled, checkpointing=plan.checkpointing, fused=plan.fused),
        ):
            trainer = trainer_class(
                model=trained,
                args=training_arguments(params, plan, scratch, seed, has_dev=bool(dev_set)),
                train_dataset=plan.train_set,
                eval_dataset=dev_set or None,
                data_collator=collator,
                eval_batch_size=params.per_device_eval_batch_size,
                checkpoints=surroundings.get("checkpoints"),
                log=surroundings["log"],
                log_speed=surroundings["log_speed"],
                progress=surroundings["progress"],
                flops=flops_per_token(causal) / world_size(),  # of this GPU
                loraplus_lr_ratio=params.loraplus_lr_ratio,
            )
            yield trainer
    if isinstance(trainer, Zero3Trainer):
        trainer.release()


def training_arguments(
    params: Training, plan: Plan, output_dir: str | Path, seed: int, *, has_dev: bool
) -> TrainingArguments:
    """The stage's parameters in the Trainer's words. Only the callbacks that `StepTrainer` has report."""
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
        optim=params.optim,
        logging_steps=params.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        eval_strategy="steps" if has_dev else "no",
        eval_steps=params.eval_steps,
        eval_on_start=has_dev,
        save_strategy="steps",
        save_steps=params.save_steps,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # else the copy of a batch waits for the step before
        # method full has weights that a step may not use: experts to which none of its tokens went
        ddp_find_unused_parameters=params.method == "full",
        use_cpu=not on_gpu,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
