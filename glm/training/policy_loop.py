"""The loop that DPO, RRHF and RAFT share: optimizer, schedule, looks at held-out prompts, checkpoints.

    def gradients(chosen):    # adds the gradient of this process's share of the loss of the rows at these indices
        ...
        return numbers        # for the curves
    numbers = run(actors, tokenizer, dev_prompts, params, len(rows), gradients, seed=…, log=…, …)

PPO has a loop of its own (`glm.training.ppo`), TRL's trainers theirs (`glm.training.trl_policy`).
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from glm.config import Rival
from glm.errors import InputError
from glm.training.actors import Actors
from glm.training.checkpoint import Checkpoints, rng_state, set_rng_state
from glm.training.distributed import sum_gradients
from glm.training.policy_eval import Show, Watch
from glm.training.trainer import Log, Progress

Gradients = Callable[[list[int]], dict[str, float]]


def run(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    dev_prompts: list[list[int]],
    params: Rival,
    rows: int,
    gradients: Gradients,
    *,
    seed: int,
    log: Log,
    progress: Progress,
    log_speed: Log | None = None,
    show: Show | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train the policy adapter in place for `params.max_steps` optimizer steps on batches of `rows` rows.

    Every `eval_steps` the policy is looked at on `dev_prompts` (eval_reward, eval_kl, …). Returns reward, KL, length
    before and after. With `checkpoints` the state is saved every `save_steps`, and a training that finds one there goes
    on from it: on the CPU the result is bit for bit that of an unbroken run, if `gradients` depends on the rows, the
    policy and torch's generators only. Points logged before the break are logged again.

    Raises:
        InputError: fewer rows than one batch, or no dev prompts.
        FloatingPointError: the gradient became NaN or infinite.
    """
    batch_at(1, rows, params.batch_size, seed)  # refuses before anything is computed
    watch = Watch(actors, tokenizer, dev_prompts, params, seed=seed, log=log, show=show)
    policy = list(actors.policy.values())
    optimizer = torch.optim.AdamW(policy, lr=params.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(params.lr_scheduler_type, optimizer, params.warmup_steps, params.max_steps)
    done = 0
    found = checkpoints.latest() if checkpoints else None
    if found is None:
        watch.start()
    else:
        done, state = found
        watch.restore(state)
        _restore(actors, optimizer, schedule, state)

    for step in range(done + 1, params.max_steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        numbers = gradients(batch_at(step, rows, params.batch_size, seed))
        numbers["learning_rate"] = schedule.get_last_lr()[0]
        sum_gradients(policy)
        numbers["grad_norm"] = nn.utils.clip_grad_norm_(policy, params.max_grad_norm).item()
        if not torch.isfinite(torch.tensor(numbers["grad_norm"])):
            raise FloatingPointError(
                f"step {step}: the gradient's norm is {numbers['grad_norm']}: lower the learning rate"
            )
        optimizer.step()
        schedule.step()
        if log_speed:
            seconds = time.perf_counter() - started
            log_speed(step, {"learn_seconds": seconds, "examples_per_second": params.batch_size / seconds})
        if step % params.eval_steps == 0 or step == params.max_steps:
            numbers |= watch.look(step)
        watch.record(step, numbers)
        progress(step, params.max_steps)
        if checkpoints and step % params.save_steps == 0 and step < params.max_steps:
            checkpoints.save(step, _state(actors, optimizer, schedule) | watch.state())
    return {"steps": params.max_steps, **watch.result()}


def batch_at(step: int, size: int, batch_size: int, seed: int) -> list[int]:
    """The indices of the batch of a step (from 1): each epoch in a new order, its incomplete last batch left out.

    Raises:
        InputError: fewer rows than one batch.
    """
    per_epoch = size // batch_size
    if per_epoch == 0:
        raise InputError(f"batch_size {batch_size} is more than the {size} training rows")
    epoch, place = divmod(step - 1, per_epoch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return order[place * batch_size : (place + 1) * batch_size]


def _state(actors: Actors, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    return {
        "policy": actors.policy_state(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": rng_state(),
    }


def _restore(actors: Actors, optimizer: torch.optim.Optimizer, schedule: Any, state: dict[str, Any]) -> None:
    actors.load_policy_state(state["policy"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    set_rng_state(state["rng"])
