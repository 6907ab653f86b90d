"""Prompts with their answers, as the actors compute them: in one packed row where the model's attention allows it.

The answers' tokens alone are looked at, so hidden states are asked for at the positions that predict them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from glm.data.collate import pad_ids
from glm.training.packing import Packing, packed_row, prefix_lm_of

# Compiled code and kernels see few shapes: a row's length, its longest sequence and its number of sequences are rounded
# up to multiples.
LENGTHS, SEQUENCES = 256, 64


@dataclass
class Batch:
    """n prompts with their answers; the longest answer has a tokens."""

    prompts: list[list[int]]
    answers: list[list[int]]
    mask: Tensor  # [n, a] 1.0 on answer tokens
    rankings: list[int] | None = None  # number of each sequence's ranking, whose answers may share their prompt

    def sizes(self) -> list[int]:
        """Tokens of each sequence, prompt and answer."""
        return [len(prompt) + len(answer) for prompt, answer in zip(self.prompts, self.answers, strict=True)]

    def ranking_sizes(self) -> list[int] | None:
        """How many sequences in turn are of one ranking; None: prompts are not shared."""
        return self.rankings and [len(list(same)) for _, same in groupby(self.rankings)]

    def rows(self, chosen: Sequence[int]) -> "Batch":
        """The sequences at the indices `chosen`."""
        return Batch(
            [self.prompts[at] for at in chosen],
            [self.answers[at] for at in chosen],
            self.mask[on_device(torch.tensor(chosen), self.mask.device)],
            self.rankings and [self.rankings[at] for at in chosen],
        )

    def parts(self, tokens: int, *, packed: bool) -> list["Batch"]:
        """The sequences, in their order, in forward passes of at most `tokens` tokens, padding included.

        A prompt that could be shared counts for each of its answers.
        """
        parts: list[list[int]] = [[]]
        filled = longest = 0
        for index, size in enumerate(self.sizes()):
            longest = max(longest, size)
            filled = filled + size if packed else longest * (len(parts[-1]) + 1)
            if parts[-1] and filled > tokens:
                parts.append([])
                filled = longest = size
            parts[-1].append(index)
        return [self.rows(part) for part in parts]


def batch_of(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    device: torch.device,
    rankings: list[int] | None = None,
) -> Batch:
    """Token ids of prompts and their answers; `rankings`: the number of the ranking that each is of."""
    lengths = torch.tensor([len(answer) for answer in answers])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    return Batch(list(prompts), list(answers), on_device(mask, device), rankings)


@dataclass
class Inputs:
    """What a model is given of a batch, and where in its flattened rows the answers are."""

    model: dict[str, Any]
    predicting: Tensor  # [m] positions whose hidden states predict the m tokens of all answers
    ends: Tensor  # [n] position of each sequence's last token
    tokens: Tensor  # [m] the answers' tokens
    places: Tensor  # [m] where they stand in the flattened [n, a]


def packing_for(config: Any, batch: Batch, *, compiled: bool) -> Packing:
    """How `batch` is put into one row of a model of this `config`."""
    return Packing(
        tokens_per_row=0,  # of no account here: what is in the batch becomes one row
        multiple=LENGTHS if compiled else 1,
        max_sequences=_up(len(batch.prompts), SEQUENCES) if compiled else len(batch.prompts),
        max_length=_up(max(batch.sizes()), LENGTHS) if compiled else max(batch.sizes()),
        prefix_lm=prefix_lm_of(config),
        max_answers=max(batch.ranking_sizes() or [1]),
    )


def inputs_of(batch: Batch, packing: Packing | None, *, masked: bool) -> Inputs:
    """The batch in one packed row, or padded on the right; `masked` says whether padding is told to the model.

    A causal model never looks at padding on the right, and without a mask attention takes its fastest kernel.
    """
    sequences = [prompt + answer for prompt, answer in zip(batch.prompts, batch.answers, strict=True)]
    sizes = batch.sizes()
    if packing is None:
        model = pad_ids(sequences, 0, "right")
        if not masked:
            del model["attention_mask"]
        starts = [row * max(sizes) for row in range(len(sequences))]
    else:
        model = packed_row(sequences, packing, 0, batch.ranking_sizes())
        starts = [0, *accumulate(sizes)][:-1]
    width, device = batch.mask.shape[1], batch.mask.device
    firsts = [start + len(prompt) - 1 for start, prompt in zip(starts, batch.prompts, strict=True)]
    spans = [torch.arange(len(answer)) for answer in batch.answers]
    predicting = torch.cat([first + span for first, span in zip(firsts, spans, strict=True)])
    ends = torch.tensor([start + size - 1 for start, size in zip(starts, sizes, strict=True)])
    if (sources := model.get("key_sources")) is not None:  # where tokens of the unshared row are in the shared one
        predicting, ends = sources[predicting], sources[ends]
    return Inputs(
        {name: on_device(value, device) if isinstance(value, Tensor) else value for name, value in model.items()},
        on_device(predicting, device),
        on_device(ends, device),
        on_device(torch.tensor([token for answer in batch.answers for token in answer]), device),
        on_device(torch.cat([row * width + span for row, span in enumerate(spans)]), device),
    )


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for the work that is queued there: pageable memory would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
