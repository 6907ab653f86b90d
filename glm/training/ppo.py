"""PPO on one frozen base (Schulman et al. 2017; the RLHF form of Ziegler et al. 2019 and Ouyang et al. 2022).

One step is: answers by the policy (`Actors.sample`; log-probabilities and values come with them), two forward passes
for reward and reference, advantages, then `ppo_epochs` passes of clipped updates. The ratio's denominator is the
log-probability with which the rollout really drew the token, so that the rounding between the fused decoder and the
training forward is an importance weight like any other (`rollout_gap` says how large it is).
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from glm.config import Ppo
from glm.data.encode import end_id
from glm.errors import InputError
from glm.generation.rollout import Samples
from glm.training.actors import Actors
from glm.training.batch import Batch, batch_of, on_device
from glm.training.checkpoint import Checkpoints, rng_state, set_rng_state
from glm.training.distributed import deal, rank, sum_gradients, summed, world_size
from glm.training.policy_eval import Judged, Show, Watch, with_distribution
from glm.training.ppo_terms import (
    ScoreScale,
    adapted_kl_coef,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    k3,
    kl_penalty,
    masked_mean,
    token_rewards,
    whiten,
)
from glm.training.trainer import Log, Progress

logger = logging.getLogger(__name__)


@dataclass
class Experience:
    """What is held fixed while the policy is updated. Shapes: n answers, a tokens of the longest."""

    batch: Batch
    answers: list[list[int]]
    logprobs: Tensor  # [n, a] of the policy that drew the answers
    values: Tensor  # [n, a]
    reference: Tensor  # [n, a] log-probabilities
    scores: Tensor  # [n] of the reward model, as they are
    advantages: Tensor  # [n, a]
    returns: Tensor  # [n, a]


def train(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    dev_prompts: list[list[int]],
    params: Ppo,
    *,
    seed: int,
    log: Log,
    progress: Progress,
    log_speed: Log | None = None,
    show: Show | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train the policy adapter and the value head in place.

    Every step logs what `report` says, and to `log_speed` its seconds and examples a second. Every `eval_steps` the
    policy is looked at on `dev_prompts` (eval_reward, eval_kl, …), and `show` gets those answers. Returns reward, KL,
    length before and after on `dev_prompts`.

    With `checkpoints` the state is saved every `save_steps`, and a training that finds one there goes on from it: on
    the CPU the result is bit for bit that of an unbroken run. Points logged before the break are logged again.

    Raises:
        InputError: fewer prompts than one batch, or no dev prompts.
        FloatingPointError: loss or gradient became NaN or infinite.
    """
    if len(prompts) < params.batch_size:
        raise InputError(f"ppo.batch_size {params.batch_size} is more than the {len(prompts)} training prompts")
    watch = Watch(actors, tokenizer, dev_prompts, params, seed=seed, log=log, show=show)
    decoder = actors.sampler.decoder
    if decoder is not None and decoder.on_gpu:
        longest = max(map(len, [*prompts, *dev_prompts]))
        decoder.reserve(params.batch_size, longest + params.max_new_tokens, params.max_new_tokens)
    optimizer = torch.optim.AdamW(actors.trained, lr=params.learning_rate, weight_decay=0.0)
    order = _endless(len(prompts), params.batch_size, seed)
    kl_coef, scale, first_step = params.kl_coef, ScoreScale(), 1

    found = checkpoints.latest() if checkpoints else None
    if found is None:
        watch.start()
    else:
        done, state = found
        first_step = done + 1
        watch.restore(state)
        kl_coef, scale = state["kl_coef"], ScoreScale(*state["scale"])
        for _ in range(done):
            next(order)
        _restore(actors, optimizer, state)

    step = first_step - 1
    for step in range(first_step, params.max_steps + 1):
        started = time.perf_counter()
        asked = [prompts[index] for index in next(order)]
        samples = actors.sample(asked, tokenizer, params)
        answered = time.perf_counter()
        experience = assess(actors, tokenizer, asked, samples, params, kl_coef, scale)
        losses = update(actors, optimizer, experience, params, step)
        if log_speed:
            seconds = {"generate_seconds": answered - started, "learn_seconds": time.perf_counter() - answered}
            log_speed(step, seconds | {"examples_per_second": len(asked) / sum(seconds.values())})
        numbers = report(experience, losses, kl_coef, end_id(tokenizer))
        if params.kl_target is not None:
            kl_coef = adapted_kl_coef(
                kl_coef, numbers["kl"], params.kl_target, params.kl_horizon, len(experience.answers)
            )
        runaway = numbers["kl"] > params.kl_stop
        if step % params.eval_steps == 0 or step == params.max_steps or runaway:
            numbers |= watch.look(step)
        watch.record(step, numbers)
        progress(step, params.max_steps)
        if runaway:
            logger.warning(
                "ppo: stopped at step %d of %d: %.1f nats a response away from SFT are more than kl_stop %g: lower "
                "learning_rate or raise kl_coef",
                *(step, params.max_steps, numbers["kl"], params.kl_stop),
            )
            break
        if checkpoints and step % params.save_steps == 0 and step < params.max_steps:
            reached = watch.state() | {"kl_coef": kl_coef, "scale": astuple(scale)}
            checkpoints.save(step, _state(actors, optimizer) | reached)
    return {
        "steps": step,
        "stopped_on_kl": float(step < params.max_steps),
        **watch.result(),
    }


@torch.no_grad()
def assess(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    samples: Samples,
    params: Ppo,
    kl_coef: float,
    scale: ScoreScale,
) -> Experience:
    """Score the policy's answers and work out advantages. `scale` is moved on where scores are normalised."""
    batch = batch_of(prompts, samples.answers, actors.model.device)
    scores = actors.score(batch)
    reference = actors.logprobs("reference", batch, params.temperature)
    end = end_id(tokenizer)
    cut = torch.tensor([float(answer[-1] != end) for answer in samples.answers], device=scores.device)
    wanted = scale.normalised(scores) if params.score_norm else scores
    if params.score_clip is not None:
        wanted = wanted.clamp(-params.score_clip, params.score_clip)
    penalty = kl_penalty(samples.logprobs, reference, params.kl_estimator)
    rewards = token_rewards(wanted - params.missing_eos_penalty * cut, penalty, batch.mask, kl_coef)
    if params.whiten_rewards:
        rewards = whiten(rewards, batch.mask, shift_mean=False)
    advantages, returns = gae(rewards, samples.values, batch.mask, params.gamma, params.lam)
    return Experience(
        batch,
        samples.answers,
        samples.logprobs,
        samples.values,
        reference,
        scores,
        whiten(advantages, batch.mask),
        returns,
    )


def update(
    actors: Actors, optimizer: torch.optim.Optimizer, experience: Experience, params: Ppo, step: int
) -> dict[str, float]:
    """`ppo_epochs` passes over the experience in minibatches, one optimizer step each; returns means over them.

    A minibatch is computed in `gradient_accumulation_steps` parts of about equal size, each weighted by its share of
    the answers' tokens, so that their number changes memory and nothing else. Several processes share its rows.
    """
    parts = -(-params.gradient_accumulation_steps // world_size())
    batch, sums, minibatches = experience.batch, {}, 0
    sizes = batch.sizes()
    for _ in range(params.ppo_epochs):
        order = torch.randperm(len(sizes)).tolist()
        for first in range(0, len(order), params.mini_batch_size):
            minibatch = order[first : first + params.mini_batch_size]
            tokens = sum(len(experience.answers[row]) for row in minibatch)
            optimizer.zero_grad()
            found: dict[str, Tensor] = {}
            mine = minibatch[rank() :: world_size()]
            for places in deal([sizes[row] for row in mine], min(parts, len(mine))):
                chosen = [mine[place] for place in places]
                part = batch.rows(chosen)
                share = sum(map(len, part.answers)) / tokens
                loss, terms = _loss(
                    actors, experience, part, on_device(torch.tensor(chosen), batch.mask.device), params
                )
                (loss * share).backward()
                for name, value in terms.items():
                    found[name] = found.get(name, 0) + value.detach() * share
            sum_gradients(actors.trained)
            found = summed(found)
            found["grad_norm"] = nn.utils.clip_grad_norm_(actors.trained, params.max_grad_norm)
            if not torch.isfinite(found["grad_norm"]):
                norm = found["grad_norm"].item()
                raise FloatingPointError(f"step {step}: the gradient's norm is {norm}: lower ppo.learning_rate")
            optimizer.step()
            if minibatches == 0:  # nothing is trained yet: what differs is the rounding of decoder and forward
                sums["rollout_gap"] = found["gap"]
            del found["gap"]
            minibatches += 1
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value
    gap = sums.pop("rollout_gap").item()
    return {name: (total / minibatches).item() for name, total in sums.items()} | {"rollout_gap": gap}


def _loss(
    actors: Actors, experience: Experience, part: Batch, chosen: Tensor, params: Ppo
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the answers `chosen`, whose sequences are `part`, and its terms."""
    old_logprobs, old_values = experience.logprobs[chosen], experience.values[chosen]
    logprobs, values, entropies = actors("policy", part, params.temperature, entropy_grad=params.entropy_coef > 0)
    policy_loss, clip_fraction = clipped_policy_loss(
        logprobs, old_logprobs, experience.advantages[chosen], part.mask, params.cliprange
    )
    value_loss = clipped_value_loss(values, old_values, experience.returns[chosen], part.mask, params.cliprange_value)
    entropy = masked_mean(entropies, part.mask)
    terms = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "clip_fraction": clip_fraction,
        "approx_kl": masked_mean(kl_penalty(old_logprobs, logprobs, "k3"), part.mask),
        "gap": masked_mean((logprobs - old_logprobs).abs(), part.mask),
    }
    return policy_loss + params.vf_coef * value_loss - params.entropy_coef * entropy, terms


def report(experience: Experience, losses: dict[str, float], kl_coef: float, end: int) -> dict[str, float]:
    """The numbers of one step, for the curves.

    Those of `with_distribution`, of the answers that were learned from; the KL to the reference by k3 besides
    (`kl_k3`) and its coefficient; and the means over the update: losses, entropy, share of clipped tokens, gradient
    norm, and `approx_kl`, how far the update went from the policy that drew the answers (k3, nats a token).
    `rollout_gap` is the mean difference of log-probabilities between rollout and training forward before the first
    update.
    """
    mask, kl = experience.batch.mask, (experience.logprobs - experience.reference).sum(-1)
    return (
        losses
        | with_distribution(Judged(experience.answers, experience.scores, kl), end)
        | {
            "kl_k3": k3(experience.logprobs, experience.reference, mask).mean().item(),
            "kl_coef": kl_coef,
            "explained_variance": explained_variance(experience.values, experience.returns, mask),
        }
    )


def _state(actors: Actors, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training changes, and the random number generators."""
    return {
        "policy": actors.policy_state(),
        "value_head": actors.value_head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng_state(),
    }


def _restore(actors: Actors, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    actors.load_policy_state(state["policy"])
    actors.value_head.load_state_dict(state["value_head"])
    optimizer.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"])


def _endless(size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices, each epoch in a new order, the incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(size, generator=generator).tolist()
        yield from (order[start : start + batch_size] for start in range(0, size - batch_size + 1, batch_size))
