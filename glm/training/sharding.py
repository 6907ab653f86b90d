"""Weights, gradients and moments that are shared out over processes (FSDP2), and made whole again for disk and use.

A training that was shared out leaves the same model and the same checkpoints behind as one process does.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from glm.training.distributed import rank
from glm.training.layers import decoder_layers


@contextmanager
def sharded(loss: nn.Module) -> Iterator[nn.Module]:
    """A copy of `loss` whose weights are shared out, layer by layer; afterwards `loss` has what became of them.

    Meanwhile the weights of `loss` itself are empty. The sharding is torch's own, since accelerate's leaves a model on
    the CPU as it is, where it can be tested; the Trainer is told not to wrap the copy again.
    """
    weights = dict(loss.named_parameters())
    moved = {id(weight): nn.Parameter(weight.data, requires_grad=weight.requires_grad) for weight in weights.values()}
    twin = copy.deepcopy(loss, moved)
    for weight in weights.values():
        weight.data = weight.data.new_empty(0)
    for layer in decoder_layers(twin):
        fully_shard(layer)
    fully_shard(twin)
    twin._is_accelerate_prepared = True
    yield twin
    for name, trained in twin.named_parameters():
        weights[name].data = whole(trained.detach())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """A state of tensors, dicts and lists with whole tensors, on the CPU of the first process; for it alone to use.

    All processes have to ask for it. One tensor at a time is whole on the GPU.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if rank() == 0 else None
    if isinstance(state, dict):
        return {name: whole_state(value) for name, value in state.items()}
    return [whole_state(value) for value in state] if isinstance(state, list) else state


def share_like(value: Any, parameter: Tensor) -> Any:
    """This process's share of `value`, if it is a tensor of the shape of a `parameter` that is shared out."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    there = value.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)


def share_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state of `optimizer`, such as one process saves, as this process's share of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        index: {name: share_like(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    return {**state, "state": shares}
