"""Lists of token ids → padded tensors."""

from collections.abc import Sequence
from typing import Literal

import torch


def pad(sequences: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> torch.Tensor:
    """Stack sequences to [batch, longest], filled with `value` on one side."""
    longest = max(len(sequence) for sequence in sequences)
    out = torch.full((len(sequences), longest), value, dtype=torch.long)
    for row, sequence in zip(out, sequences, strict=True):
        start = longest - len(sequence) if side == "left" else 0
        row[start : start + len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
    return out


def pad_ids(sequences: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (1 = real token), each [batch, longest].

    Pad on the right for a forward pass: every model then counts positions from the first token without being told.
    `generate` wants the padding on the left and works the positions out from the mask.
    """
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, side)
    return {"input_ids": pad(sequences, pad_id, side), "attention_mask": mask}
