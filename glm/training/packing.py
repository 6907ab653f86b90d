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

from glm.data.packing import best_fit

Item = TypeVar("Item")


@dataclass(frozen=True)
class Packing:
    """How rows are made. A row longer than `tokens_per_row` occurs only where one example alone is longer.

    `multiple`: rows are filled up to a multiple of so many tokens, so that compiled code sees few shapes.
    `max_sequences`: entries of the offsets, the same for every row for the same reason.
    `max_length`: of one sequence; likewise constant.
    """

    tokens_per_row: int
    multiple: int
    max_sequences: int
    max_length: int


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

    `input_ids` and `position_ids` [1, length], offsets int32 [max_sequences + 2], and the longest sequence's length.
    """
    total = sum(map(len, sequences))
    length = -(-total // packing.multiple) * packing.multiple
    lengths = [*map(len, sequences), *([length - total] if length > total else [])]
    most = max(packing.max_sequences, len(sequences))  # a look at the dev set may bring more, and is not compiled
    offsets = torch.full((most + 2,), length, dtype=torch.int32)
    offsets[0] = 0
    offsets[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    ids = torch.full((1, length), pad_id)
    ids[0, :total] = torch.tensor([token for sequence in sequences for token in sequence])
    longest = max(packing.max_length, packing.multiple)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(size) for size in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
