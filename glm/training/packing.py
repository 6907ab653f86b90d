"""Packing: short examples side by side in one row, so that no computing goes into padding.

A row [1, length] holds several sequences; positions restart in each, and offsets (`cu_seq_lens_*`, the names that
transformers' flash attention takes) tell the attention where they begin, see `glm.models.packed_attention`. The loss of
a step is a sum over its rows divided by the step's items, so that how examples fall into rows changes nothing.

Left out: packing across steps (a step's examples are packed among themselves, or with `tokens_per_step` the whole
data set is packed once, by glm.data.packing), splitting an example over two rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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
    """

    tokens_per_row: int
    multiple: int
    max_sequences: int
    max_length: int
    prefix_lm: ChatGLMConfig | None = None


def pack_step(items: list[Item], size: Callable[[Item], int], capacity: int) -> list[list[Item]]:
    """The items of one step in as few rows as best-fit decreasing finds."""
    ordered = sorted(items, key=size, reverse=True)
    return [[ordered[index] for index in row] for row in best_fit([size(item) for item in ordered], capacity)]


def step_rows(
    step: list[Any], packing: Packing | None, micro_batch_size: int, size: Callable[[Any], int]
) -> list[list[Any]]:
    """A step's examples as the rows that are computed one after the other: packed, or `micro_batch_size` to a row.

    A step that holds lists already comes from `PackedRows` and is taken as it is.
    """
    if packing is None:
        return [step[at : at + micro_batch_size] for at in range(0, len(step), micro_batch_size)]
    return pack_step(step, size, packing.tokens_per_row) if isinstance(step[0], dict) else step


def packed_row(sequences: list[list[int]], packing: Packing, pad_id: int) -> dict[str, Any]:
    """A model's inputs for sequences in one row, in their order; filling at the end is a sequence of its own.

    `input_ids` and `position_ids` [1, length], offsets int32 [max_sequences + 2], and the longest sequence's length;
    for a prefix LM `position_ids` [1, 2, length] and where its prompts are, see `varlen_attention`.
    """
    total = sum(map(len, sequences))
    length = -(-total // packing.multiple) * packing.multiple
    lengths = [*map(len, sequences), *([length - total] if length > total else [])]
    most = max(packing.max_sequences, len(sequences))  # a look at the dev set may bring more, and is not compiled
    offsets = _offsets(lengths, most + 2)
    ids = torch.full((1, length), pad_id)
    ids[0, :total] = torch.tensor([token for sequence in sequences for token in sequence])
    longest = max(packing.max_length, packing.multiple)
    row = {
        "input_ids": ids,
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if packing.prefix_lm is not None:
        return row | _prefix_lm(sequences, length - total, packing.prefix_lm, 2 * most + 2)
    return row | {"position_ids": torch.cat([torch.arange(size) for size in lengths])[None]}


def _prefix_lm(sequences: list[list[int]], filling: int, config: ChatGLMConfig, entries: int) -> dict[str, Tensor]:
    """Positions, prompts, and the offsets of prompts and answers in turn."""
    positions = [prefix_lm_positions(config, torch.tensor([sequence])) for sequence in sequences]
    prompts = [int((position[0, 1] == 0).sum()) for position in positions]
    parts = [
        part for sequence, prompt in zip(sequences, prompts, strict=True) for part in (prompt, len(sequence) - prompt)
    ]
    positions.append(torch.ones(1, 2, filling, dtype=torch.long))
    position_ids = torch.cat(positions, dim=-1)
    return {
        "position_ids": position_ids,
        "in_prefix": position_ids[:, 1] == 0,
        "cu_seq_lens_prefix": _offsets([*parts, filling], entries),
    }


def _offsets(lengths: list[int], entries: int) -> Tensor:
    """Where sequences of `lengths` begin, then the end of the last as often as `entries` need it."""
    offsets = torch.full((entries,), sum(lengths), dtype=torch.int32)
    offsets[0] = 0
    offsets[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    return offsets
