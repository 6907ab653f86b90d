"""Which examples share a row of a given length, so that no computing goes into padding."""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, overload

Example = dict[str, Any]


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins of `capacity`: each goes, in its turn, where it leaves the least room.

    With `sizes` in decreasing order this is best-fit decreasing, which needs at most 11/9 of the least number of bins
    (Johnson et al. 1974, as first-fit decreasing). A size above `capacity` gets a bin of its own.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different rooms that are left, sorted
    with_room: dict[int, list[int]] = {}  # room → heap of bins
    for index, size in enumerate(sizes):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            bins.append([])
            room, chosen = capacity, len(bins) - 1
        else:
            room = rooms[at]
            chosen = heappop(with_room[room])
            if not with_room[room]:
                del with_room[rooms.pop(at)]
        bins[chosen].append(index)
        left = room - size
        if left > 0:
            if left not in with_room:
                insort(rooms, left)
            heappush(with_room.setdefault(left, []), chosen)
    return bins


def pack(sizes: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Indices of all examples in rows of `capacity` tokens.

    They come in random order, so that a row is a fair sample: in decreasing order the last rows would hold nothing but
    the shortest. On instruction data that costs less than a hundredth of a row (tests/data/test_packed_rows.py).
    """
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    return [[order[at] for at in row] for row in best_fit([sizes[index] for index in order], capacity)]


class PackedRows(Sequence[list[Example]]):
    """Rows of examples, which are read as they are asked for."""

    def __init__(self, examples: Sequence[Example], rows: list[list[int]]) -> None:
        self.examples = examples
        self.rows = rows
        """The indices of each row's examples."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> list[Example]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Example]]: ...
    def __getitem__(self, index: int | slice) -> list[Example] | list[list[Example]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return [self.examples[at] for at in self.rows[index]]
