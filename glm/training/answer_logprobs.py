"""Log-probabilities of whole answers, for the algorithms that learn from rankings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.distributed import gathered, share_of
from glm.training.packing import pack_step

Ranking = dict[str, Any]  # `sequences`, best answer first, and the `starts` of their answers


def rows_of(rankings: Sequence[Ranking], tokens: int) -> list[list[Ranking]]:
    """Rankings in forward passes of about `tokens` tokens; a ranking is never split."""
    return pack_step(list(rankings), ranking_tokens, tokens)


def ranking_tokens(ranking: Ranking) -> int:
    """Tokens of a ranking's sequences."""
    return sum(map(len, ranking["sequences"]))


def answer_logprobs(actors: Actors, adapter: str, rankings: Sequence[Ranking]) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of each answer's tokens [n], and its number of tokens [n], ranking after ranking."""
    parts = [
        (ids[:start], ids[start:])
        for ranking in rankings
        for ids, start in zip(ranking["sequences"], ranking["starts"], strict=True)
    ]
    prompts, answers = zip(*parts, strict=True)
    batch = batch_of(prompts, answers, actors.model.device)
    logprobs, _, _ = actors(adapter, batch, 1.0)
    return logprobs.sum(-1), batch.mask.sum(-1)


@torch.no_grad()
def reference_logprobs(actors: Actors, rankings: Sequence[Ranking], tokens: int) -> list[list[float]]:
    """The answers' log-probabilities under the adapter "reference", for each ranking."""
    found: dict[int, list[float]] = {}
    numbered = [{**ranking, "number": number} for number, ranking in enumerate(rankings)]
    for row in rows_of(share_of(numbered, ranking_tokens), tokens):
        sums, _ = answer_logprobs(actors, "reference", row)
        sizes = [len(ranking["sequences"]) for ranking in row]
        for ranking, values in zip(row, sums.split(sizes), strict=True):
            found[ranking["number"]] = values.tolist()
    found = gathered(found)
    return [found[number] for number in range(len(rankings))]
