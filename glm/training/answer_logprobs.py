"""Log-probabilities of whole answers, computed on packed rows where the model allows it, else on padded ones."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm.config import Offline
from glm.models.adapters import causal_lm, half_precision, last_hidden
from glm.models.chatglm1 import ChatGLMConfig
from glm.models.packed_attention import VARLEN, attention_of, why_not_packed
from glm.training.actors import Actors, pack, token_logprobs
from glm.training.distributed import gathered, share_of
from glm.training.packing import Packing, pack_step, packed_row, token_count

Ranking = dict[str, Any]  # `sequences`, best answer first, and the `starts` of their answers


def packing_of(actors: Actors, params: Offline) -> Packing | None:
    """How rows are packed; None where the parameters or the model's attention do not let them be."""
    model = causal_lm(actors.model)
    if not params.packing or why_not_packed(model):
        return None
    return Packing(
        params.tokens_per_forward,
        multiple=1,
        max_sequences=0,
        max_length=0,
        prefix_lm=model.config if isinstance(model.config, ChatGLMConfig) else None,
        max_answers=2 if params.share_prompt else 1,
    )


def rows_of(rankings: Sequence[Ranking], packing: Packing | None, tokens: int) -> list[list[Ranking]]:
    """Rankings in forward passes of about `tokens` tokens; a ranking is never split."""
    return pack_step(list(rankings), partial(token_count, packing=packing), tokens)


def own_share(rankings: Sequence[Ranking], packing: Packing | None) -> Sequence[Ranking]:
    """The rankings that this process computes."""
    return share_of(rankings, partial(token_count, packing=packing))


def answer_logprobs(
    actors: Actors, adapter: str, rankings: Sequence[Ranking], packing: Packing | None, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of each answer's tokens [n], and its number of tokens [n], ranking after ranking."""
    sequences = [sequence for ranking in rankings for sequence in ranking["sequences"]]
    starts = [start for ranking in rankings for start in ranking["starts"]]
    device = actors.model.device
    lengths = torch.tensor([len(ids) - start for ids, start in zip(sequences, starts, strict=True)], device=device)
    if packing is None:
        pairs = zip(sequences, starts, strict=True)
        prompts, answers = zip(*((ids[:start], ids[start:]) for ids, start in pairs), strict=True)
        logprobs, _, _ = actors(adapter, pack(list(prompts), list(answers), pad_id, device), 1.0)
        return logprobs.sum(-1), lengths
    packing = replace(packing, max_sequences=len(sequences), max_length=max(map(len, sequences)))
    inputs = packed_row(sequences, packing, pad_id, [len(ranking["sequences"]) for ranking in rankings])
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    actors.use(adapter)
    with attention_of(causal_lm(actors.model), VARLEN):
        hidden = last_hidden(actors.model, **inputs)[0]
    ends = torch.tensor([*map(len, sequences)]).cumsum(0).tolist()
    spans = zip(ends, lengths.tolist(), strict=True)
    positions = torch.cat([torch.arange(end - length, end) for end, length in spans]).to(device)
    before, own = positions - 1, positions
    if (sources := inputs.get("key_sources")) is not None:
        before, own = sources[before], sources[own]
    head = actors.model.get_output_embeddings()
    with half_precision(actors.model):
        logprobs, _ = token_logprobs(hidden[before], head, inputs["input_ids"][0, own], 1.0)
    owner = torch.arange(len(sequences), device=device).repeat_interleave(lengths)
    return torch.zeros(len(sequences), device=device).index_add(0, owner, logprobs), lengths


@torch.no_grad()
def reference_logprobs(
    actors: Actors, rankings: Sequence[Ranking], packing: Packing | None, pad_id: int, tokens: int
) -> list[list[float]]:
    """The answers' log-probabilities under the adapter "reference", for each ranking."""
    found: dict[int, list[float]] = {}
    numbered = [{**ranking, "number": number} for number, ranking in enumerate(rankings)]
    for row in rows_of(own_share(numbered, packing), packing, tokens):
        sums, _ = answer_logprobs(actors, "reference", row, packing, pad_id)
        sizes = [len(ranking["sequences"]) for ranking in row]
        for ranking, values in zip(row, sums.split(sizes), strict=True):
            found[ranking["number"]] = values.tolist()
    found = gathered(found)
    return [found[number] for number in range(len(rankings))]
