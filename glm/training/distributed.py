"""Several processes, one a GPU, that take every step together.

All of them read the same global batch, in the same order, and have torch's generator in the same state; each computes
its share of the rows, and sums bring the results together. So their number changes nothing but rounding, and what one
process saved another number can go on from. In a lone process every function here is the plain computation.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from heapq import heapify, heapreplace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")
Value = TypeVar("Value")
Rows = TypeVar("Rows", list, Tensor)

PATIENCE = timedelta(hours=2)  # the first process alone saves; the launcher ends those that wait for a dead one
BUCKET = 2**26  # gradients that are summed at a time: 256 MB in float32


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; the first one, 0, is who saves and logs."""
    return dist.get_rank() if dist.is_initialized() else 0


def join() -> None:
    """Take the GPU and the place among the processes that the launcher's environment gives to this one."""
    from accelerate import PartialState

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    PartialState(cpu=not on_gpu, timeout=PATIENCE)


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of `sizes` in `hands` lists whose sums are nearly equal: the largest first, each to the smallest list.

    The largest sum is at most 4/3 of the least possible one (Graham 1969, LPT).
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [(0, hand) for hand in range(hands)]
    heapify(sums)
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True):
        total, hand = sums[0]
        dealt[hand].append(index)
        heapreplace(sums, (total + sizes[index], hand))
    return dealt


def shared_rows(rows: int, compute: Callable[[Sequence[int]], Tensor], device: torch.device) -> Tensor:
    """`compute(indices)` [m, …] of this process's share of the rows, and of the others' theirs: [rows, …]."""
    if world_size() == 1:
        return compute(range(rows))
    mine = range(rank(), rows, world_size())
    part = compute(mine or range(1))
    whole = part.new_zeros(rows, *part.shape[1:])
    whole[torch.tensor(mine, device=device, dtype=torch.long)] = part[: len(mine)]
    dist.all_reduce(whole)
    return whole


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the sum of all processes' gradients in the place of each one's own."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    while parameters:
        bucket, size = [], 0
        while parameters and size < BUCKET:
            bucket.append(parameters.pop(0))
            size += bucket[-1].numel()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = summed.view_as(parameter).clone()


def summed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the processes of scalars that all of them have."""
    if world_size() == 1:
        return values
    stacked = torch.stack(list(values.values()))
    dist.all_reduce(stacked)
    return dict(zip(values, stacked, strict=True))


def summed_numbers(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The same of plain numbers; `device` is where the processes' tensors are."""
    if world_size() == 1:
        return values
    tensors = {name: torch.tensor(value, device=device) for name, value in values.items()}
    return {name: value.item() for name, value in summed(tensors).items()}


def share_of(items: Sequence[Item], size: Callable[[Item], int]) -> Sequence[Item]:
    """The items that this process computes, all of them in a lone one; by `size`, all processes have as much."""
    if world_size() == 1:
        return items
    return [items[index] for index in deal([size(item) for item in items], world_size())[rank()]]


def gathered(values: dict[int, Value]) -> dict[int, Value]:
    """What all processes have found, each for keys of its own."""
    if world_size() == 1:
        return values
    found: list[dict[int, Value]] = [{} for _ in range(world_size())]
    dist.all_gather_object(found, values)
    return {key: value for each in found for key, value in each.items()}


def joined(items: list[Item]) -> list[Item]:
    """The items of all processes, those of the first one first."""
    if world_size() == 1:
        return items
    found: list[list[Item]] = [[] for _ in range(world_size())]
    dist.all_gather_object(found, items)
    return [item for each in found for item in each]


def own_part(items: Rows) -> Rows:
    """This process's of the rows of all; each has as many, the first ones are the first process's."""
    size = len(items) // world_size()
    return items[rank() * size : (rank() + 1) * size]


def from_first(value: Value) -> Value:
    """The first process's value: where rounding must not make processes part ways."""
    if world_size() == 1:
        return value
    if isinstance(value, Tensor):
        dist.broadcast(value, 0)
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]
