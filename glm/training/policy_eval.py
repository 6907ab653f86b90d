"""What a policy's sampled answers to held-out prompts are like: reward, KL, length, repetition."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glm.data.encode import end_id
from glm.training.actors import Actors, Sampling, pack


@dataclass
class Judged:
    """Answers to n prompts with the reward model's score and the KL estimate (k1, nats) of each."""

    answers: list[list[int]]
    rewards: Tensor  # [n]
    kl: Tensor  # [n]


@torch.no_grad()
def judge(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: Sampling,
    *,
    seed: int,
    adapter: str = "policy",
) -> Judged:
    """Answer the prompts under `adapter`, always with the same random numbers, and score the answers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        samples = actors.sample(prompts, tokenizer, params, adapter)
    batch = pack(prompts, samples.answers, tokenizer.pad_token_id, actors.model.device)
    reference = actors.logprobs("reference", batch, params.temperature)
    return Judged(samples.answers, actors.score(batch), (samples.logprobs - reference).sum(-1))


def evaluate(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: Sampling,
    *,
    seed: int,
    adapter: str = "policy",
) -> dict[str, float]:
    """`summary` of `judge`."""
    return summary(judge(actors, tokenizer, prompts, params, seed=seed, adapter=adapter), end_id(tokenizer))


def summary(judged: Judged, end: int) -> dict[str, float]:
    """Means over the answers.

    `reward` and its `reward_std`, `kl` (nats an answer from the adapter "reference"), `response_length` in tokens,
    `truncated` (share that did not end within max_new_tokens), `repetition`.
    """
    answers = judged.answers
    return {
        "reward": judged.rewards.mean().item(),
        "reward_std": judged.rewards.std().item(),
        "kl": judged.kl.mean().item(),
        "response_length": sum(map(len, answers)) / len(answers),
        "truncated": sum(answer[-1] != end for answer in answers) / len(answers),
        "repetition": repetition(answers),
    }


def repetition(answers: list[list[int]]) -> float:
    """Share of an answer's token pairs that the same answer had before, averaged over answers."""
    shares = []
    for answer in answers:
        bigrams = list(pairwise(answer))
        shares.append(1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0)
    return sum(shares) / len(shares)
