"""RAFT: reward-ranked fine-tuning (Dong et al. 2023, algorithm 1): the policy learns the best of its own answers.

A step draws `num_generations` answers to each of `batch_size` prompts, keeps the one with the highest reward, and takes
one gradient step on the cross entropy of those. With `beta` the reward is less β log π/π_ref of the answer (the paper's
KL-regularised variant).
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from glm.config import Raft
from glm.data.encode import end_id
from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.distributed import rank, summed_numbers, world_size
from glm.training.policy_eval import Judged, with_distribution
from glm.training.policy_loop import run


def train(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    dev_prompts: list[list[int]],
    params: Raft,
    *,
    seed: int,
    **options: Any,
) -> dict[str, float]:
    """Train the policy adapter in place on `prompts`; see `policy_loop.run` for the rest and the options.

    Curves: `policy_eval.with_distribution` of all answers, `best_reward` of those that are learned, and their `loss`
    in nats a token.
    """
    count = params.num_generations

    def gradients(chosen: list[int]) -> dict[str, float]:
        repeated = [prompts[index] for index in chosen for _ in range(count)]
        samples = actors.sample(repeated, tokenizer, params)
        batch = batch_of(repeated, samples.answers, actors.model.device)
        scores = actors.score(batch)
        kl = (samples.logprobs - actors.logprobs("reference", batch, params.temperature)).sum(-1)
        best = best_of(scores - params.beta * kl, count)
        tokens = batch.mask[best].sum()
        loss = 0.0
        for part in actors.parts(batch.rows(best[rank() :: world_size()].tolist())):
            logprobs, _, _ = actors("policy", part, 1.0)
            part_loss = -logprobs.sum() / tokens
            part_loss.backward()
            loss += part_loss.item()
        numbers = summed_numbers({"loss": loss}, scores.device) | with_distribution(
            Judged(samples.answers, scores, kl), end_id(tokenizer)
        )
        return numbers | {"best_reward": scores[best].mean().item()}

    return run(actors, tokenizer, dev_prompts, params, len(prompts), gradients, seed=seed, **options)


def best_of(rewards: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [n / count] of the highest of each `count` rewards that follow each other."""
    return rewards.view(-1, count).argmax(-1) + torch.arange(0, len(rewards), count, device=rewards.device)
