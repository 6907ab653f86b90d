"""Which rows of each dataset go into a mixture: as many as asked, chosen by hash and never by position.

Files are often sorted, so that their first rows are no sample; and a choice by hash does not move when rows are added
elsewhere in the file.
"""

from __future__ import annotations  # array[int] cannot be written out before Python 3.12

from array import array
from collections.abc import Mapping
from typing import Literal, NamedTuple

EVERY = 2**64  # above every key


class Share(NamedTuple):
    """What a dataset gives: every row `passes` times, and those whose key is below `below` once more."""

    passes: int
    below: int


def smallest(keys: array[int], count: int) -> int:
    """The bound below which `count` of the keys (64 bits, practically distinct) lie."""
    return EVERY if count >= len(keys) else sorted(keys)[count]


def smallest_by_size(keys: array[int], sizes: array[int], budget: float) -> int:
    """The bound of the rows which, taken by ascending key, come closest to `budget` from below."""
    total = 0
    for at in sorted(range(len(keys)), key=keys.__getitem__):
        total += sizes[at]
        if total > budget:
            return keys[at]
    return EVERY


def shares(
    weights: Mapping[str, float],
    keys: Mapping[str, array[int]],
    tokens: Mapping[str, array[int]],
    by: Literal["examples", "tokens"],
    strategy: Literal["first_exhausted", "all_exhausted"],
) -> dict[str, Share]:
    """What each dataset gives so that their sizes stand in the ratio of `weights`.

    "first_exhausted" takes no row twice: the dataset that is shortest for its weight gives all, the others less.
    "all_exhausted" leaves no row out: the one that is longest for its weight gives all, the others repeat theirs. (The
    names are those of `datasets.interleave_datasets`, whose draws are random where these ratios are exact.)
    """
    size = {name: float(len(keys[name]) if by == "examples" else sum(tokens[name])) for name in weights}
    filled = [size[name] / weights[name] for name in weights if size[name]]
    if not filled:
        return {name: Share(0, EVERY) for name in weights}
    whole = min(filled) if strategy == "first_exhausted" else max(filled)
    out = {}
    for name, weight in weights.items():
        passes, rest = divmod(weight * whole, size[name]) if size[name] else (0.0, 0.0)
        if round(rest) >= size[name]:  # a whole pass, but for rounding
            below = EVERY
        elif by == "examples":
            below = smallest(keys[name], round(rest))
        else:
            below = smallest_by_size(keys[name], tokens[name], rest)
        out[name] = Share(int(passes), below)
    return out
