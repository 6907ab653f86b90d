"""Packing: short examples side by side in one row, so that no computing goes into padding.

A row [1, length] holds several sequences; positions restart in each, and offsets (`cu_seq_lens_*`, the names that
transformers' flash attention takes) tell the attention where they begin, see `glm.models.packed_attention`. The loss of
a step is a sum over its rows divided by the step's items, so that how examples fall into rows changes nothing.

What all sequences of a ranking begin with, the prompt, can be computed once: the first sequence stands in the row
whole, and of the others what comes after the prompt, at the positions that it has there. It sees the prompt and itself.

Left out: packing across steps (a step's examples are packed among themselves, or with `tokens_per_step` the whole
data set is packed once, by glm.data.packing), splitting an example over two rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from glm.data.packing import best_fit
from glm.models.chatglm1 import ChatGLMConfig, prefix_lm_positions

Item = TypeVar("Item")


@dataclass(frozen=True)
class Packing:
    """How rows are made. A row longer than `tokens_per_row` occurs only where one example alone is longer.

    `multiple`: rows are filled up to a multiple of so many tokens, so that compiled code sees few shapes.
    `max_sequences`: entries of the offsets, the same for every row for the same reason.
    `max_length`: of one sequence; likewise constant.
    `prefix_lm`: the config of a model that reads prompts in both directions and counts positions in its own way.
    `max_answers`: of the rankings whose answers share the computation of their prompt; 1: none do. Likewise constant.
    """

    tokens_per_row: int
    multiple: int
    max_sequences: int
    max_length: int
    prefix_lm: ChatGLMConfig | None = None
    max_answers: int = 1


def prefix_lm_of(config: Any) -> ChatGLMConfig | None:
    """The config, if it is that of a model that reads prompts in both directions."""
    return config if isinstance(config, ChatGLMConfig) else None


def pack_step(items: list[Item], size: Callable[[Item], int], capacity: int) -> list[list[Item]]:
    """The items of one step in as few rows as best-fit decreasing finds."""
    ordered = sorted(items, key=size, reverse=True)
    return [[ordered[index] for index in row] for row in best_fit([size(item) for item in ordered], capacity)]


def step_rows(step: list[Any], packing: Packing | None, micro_batch_size: int) -> list[list[Any]]:
    """A step's examples as the rows that are computed one after the other: packed, or `micro_batch_size` to a row.

    A step that holds lists already comes from `PackedRows` and is taken as it is.
    """
    if packing is None:
        return [step[at : at + micro_batch_size] for at in range(0, len(step), micro_batch_size)]
    if isinstance(step[0], list):
        return step
    return pack_step(step, partial(token_count, packing=packing), packing.tokens_per_row)


def token_count(item: Any, packing: Packing | None) -> int:
    """Tokens of an example, of a ranking, or of a row of them, as many as are computed."""
    if isinstance(item, list):
        return sum(token_count(part, packing) for part in item)
    if "input_ids" in item:
        return len(item["input_ids"])
    if packing is None or packing.max_answers == 1:
        return sum(map(len, item["sequences"]))
    return sum(own_lengths(item["sequences"], packing.prefix_lm))


def own_lengths(sequences: Sequence[Any], prefix_lm: ChatGLMConfig | None) -> list[int]:
    """Of a ranking's sequences of token ids, how many each computes where they share what they begin with.

    The first computes all of its own, the others at least one. A prefix LM has to have its whole prompt in common: a
    token of it that differs changes those before.
    """
    most = min(map(len, sequences)) - 1
    ids = np.array([sequence[:most] for sequence in sequences])
    differs = (ids != ids[0]).any(axis=0)
    shared = int(differs.argmax()) if differs.any() else most
    if prefix_lm is not None and prefix_lm.bos_token_id not in ids[0, :shared]:
        shared = 0
    return [len(sequences[0]), *(len(sequence) - shared for sequence in sequences[1:])]


def packed_row(
    sequences: list[list[int]], packing: Packing, pad_id: int, sizes: list[int] | None = None
) -> dict[str, Any]:
    """A model's inputs for sequences in one row, in their order; filling at the end is a sequence of its own.

    `input_ids` and `position_ids` [1, length], offsets int32 [max_sequences + 2], and the longest sequence's length;
    for a prefix LM `position_ids` [1, 2, length] and where its prompts are, see `varlen_attention`. `sizes`: of the
    rankings that the sequences are; where these share prompts, `key_sources` and `key_copies` besides.
    """
    rankings = _split(sequences, sizes or [1] * len(sequences))
    lengths = [*map(len, sequences)]
    if packing.max_answers > 1:
        lengths = [length for ranking in rankings for length in own_lengths(ranking, packing.prefix_lm)]
    total = sum(lengths)
    filling = -total % packing.multiple
    most = max(packing.max_sequences, len(sequences))  # a look at the dev set may bring more, and is not compiled
    own = [sequence[len(sequence) - length :] for sequence, length in zip(sequences, lengths, strict=True)]
    ids = torch.full((1, total + filling), pad_id)
    ids[0, :total] = torch.tensor([token for tokens in own for token in tokens])
    longest = max(packing.max_length, packing.multiple)
    offsets = _offsets([*lengths, filling], most + 2)
    row = {
        "input_ids": ids,
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if packing.max_answers > 1:
        row["cu_seq_lens_k"] = _offsets([*map(len, sequences), filling], most + 2)
        row |= _shared_keys(rankings, lengths, filling, packing.max_answers)
    if packing.prefix_lm is not None:
        return row | _prefix_lm(sequences, lengths, filling, packing.prefix_lm, 2 * most + 2)
    positions = [torch.arange(len(tokens))[-length:] for tokens, length in zip(sequences, lengths, strict=True)]
    return row | {"position_ids": torch.cat([*positions, torch.arange(filling)])[None]}


def _shared_keys(rankings: list[list[list[int]]], own: list[int], filling: int, max_answers: int) -> dict[str, Tensor]:
    """For every key of the unshared row the token of the shared one that it is of; and for every token its keys."""
    lengths = iter(own)
    sources: list[Tensor] = []
    copies = torch.full((max(max_answers, *map(len, rankings)), sum(own) + filling), -1)
    token, key = 0, 0
    for ranking in rankings:
        prompt = token
        for number, sequence in enumerate(ranking):
            length = next(lengths)
            shared = len(sequence) - length
            sources += [torch.arange(prompt, prompt + shared), torch.arange(token, token + length)]
            copies[number, prompt : prompt + shared] = torch.arange(key, key + shared)
            copies[0, token : token + length] = torch.arange(key + shared, key + len(sequence))
            token, key = token + length, key + len(sequence)
    sources.append(torch.arange(token, token + filling))
    copies[0, token:] = torch.arange(key, key + filling)
    return {"key_sources": torch.cat(sources), "key_copies": copies}


def _prefix_lm(
    sequences: list[list[int]], own: list[int], filling: int, config: ChatGLMConfig, entries: int
) -> dict[str, Tensor]:
    """Positions, prompts, and the offsets of prompts and answers in turn."""
    whole = [prefix_lm_positions(config, torch.tensor([sequence])) for sequence in sequences]
    positions = [position[..., -length:] for position, length in zip(whole, own, strict=True)]
    prompts = [int((position[0, 1] == 0).sum()) for position in positions]
    parts = [part for length, prompt in zip(own, prompts, strict=True) for part in (prompt, length - prompt)]
    positions.append(torch.ones(1, 2, filling, dtype=torch.long))
    position_ids = torch.cat(positions, dim=-1)
    return {
        "position_ids": position_ids,
        "in_prefix": position_ids[:, 1] == 0,
        "cu_seq_lens_prefix": _offsets([*parts, filling], entries),
    }


def _split(items: list[Item], sizes: list[int]) -> list[list[Item]]:
    rest = iter(items)
    return [list(islice(rest, size)) for size in sizes]


def _offsets(lengths: list[int], entries: int) -> Tensor:
    """Where sequences of `lengths` begin, then the end of the last as often as `entries` need it."""
    offsets = torch.full((entries,), sum(lengths), dtype=torch.int32)
    offsets[0] = 0
    offsets[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    return offsets
