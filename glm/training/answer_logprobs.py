"""Log-probabilities of whole answers, for the algorithms that learn from rankings."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glm.models.adapters import causal_lm
from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.distributed import gathered, share_of
from glm.training.packing import own_lengths, pack_step, prefix_lm_of

Ranking = dict[str, Any]  # `sequences`, best answer first, and the `starts` of their answers


def rows_of(rankings: Sequence[Ranking], size: Callable[[Ranking], int], tokens: int) -> list[list[Ranking]]:
    """Rankings in forward passes of about `tokens` tokens; a ranking is never split.

    Of several processes, each has its share of them.
    """
    return pack_step(list(share_of(rankings, size)), size, tokens)


def ranking_size(actors: Actors, *, share_prompt: bool) -> Callable[[Ranking], int]:
    """What tells how many tokens of a ranking are computed."""
    if not (share_prompt and actors.packed):
        return lambda ranking: sum(map(len, ranking["sequences"]))
    prefix_lm = prefix_lm_of(causal_lm(actors.model).config)
    return lambda ranking: sum(own_lengths(ranking["sequences"], prefix_lm))


def answer_logprobs(
    actors: Actors, adapter: str, rankings: Sequence[Ranking], *, share_prompt: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of each answer's tokens [n], and its number of tokens [n], ranking after ranking."""
    parts = [
        (ids[:start], ids[start:], number)
        for number, ranking in enumerate(rankings)
        for ids, start in zip(ranking["sequences"], ranking["starts"], strict=True)
    ]
    prompts, answers, numbers = zip(*parts, strict=True)
    batch = batch_of(prompts, answers, actors.model.device, list(numbers) if share_prompt else None)
    logprobs, _, _ = actors(adapter, batch, 1.0)
    return logprobs.sum(-1), batch.mask.sum(-1)


@torch.no_grad()
def reference_logprobs(
    actors: Actors, rankings: Sequence[Ranking], tokens: int, *, share_prompt: bool
) -> list[list[float]]:
    """The answers' log-probabilities under the adapter "reference", for each ranking."""
    found: dict[int, list[float]] = {}
    numbered = [{**ranking, "number": number} for number, ranking in enumerate(rankings)]
    for row in rows_of(numbered, ranking_size(actors, share_prompt=share_prompt), tokens):
        sums, _ = answer_logprobs(actors, "reference", row, share_prompt=share_prompt)
        sizes = [len(ranking["sequences"]) for ranking in row]
        for ranking, values in zip(row, sums.split(sizes), strict=True):
            found[ranking["number"]] = values.tolist()
    found = gathered(found)
    return [found[number] for number in range(len(rankings))]
