"""Lists of token ids → padded tensors."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from glm.data.encode import IGNORED


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


class SftCollator:
    """Right-padded batches with labels."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad_ids([example["input_ids"] for example in examples], self.pad_id, "right")
        return {**batch, "labels": pad([example["labels"] for example in examples], IGNORED, "right")}


class PairCollator:
    """Right-padded sequences of ranked answers: those of the first example best first, then the second's, …

    `sizes` says how many answers each example has.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [sequence for example in examples for sequence in example["sequences"]]
        sizes = torch.tensor([len(example["sequences"]) for example in examples])
        return {**pad_ids(sequences, self.pad_id, "right"), "sizes": sizes}
