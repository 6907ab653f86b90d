"""What FSDP and ZeRO share: a training on a copy of the model whose weights are shared out, and what is whole of it.

A training that was shared out leaves the same model and the same checkpoints behind as one process does.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from glm.training.distributed import rank


@contextmanager
def lent(loss: nn.Module) -> Iterator[nn.Module]:
    """A copy of `loss` that has its weights, for an engine to share out; afterwards `loss` has what became of them.

    Meanwhile the weights of `loss` itself are empty. The Trainer is told not to wrap the copy in an engine of its own.
    """
    weights = dict(loss.named_parameters())
    moved = {id(weight): nn.Parameter(weight.data, requires_grad=weight.requires_grad) for weight in weights.values()}
    twin = copy.deepcopy(loss, moved)
    for weight in weights.values():
        weight.data = weight.data.new_empty(0)
    twin._is_accelerate_prepared = True
    yield twin
    for name, trained in twin.named_parameters():
        weights[name].data = whole(trained)


def whole(weight: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a share. All processes have to ask."""
    if isinstance(weight, DTensor):
        return weight.detach().full_tensor()
    if hasattr(weight, "ds_id"):  # one of DeepSpeed's
        from deepspeed import zero

        with zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach()


def whole_state(state: Any) -> Any:
    """A state of tensors, dicts and lists with whole tensors, on the CPU of the first process; for it alone to use.

    All processes have to ask for it. One tensor at a time is whole on the GPU.
    """
    if isinstance(state, DTensor) or hasattr(state, "ds_id"):
        full = whole(state)
        return full.cpu() if rank() == 0 else None
    if isinstance(state, dict):
        return {name: whole_state(value) for name, value in state.items()}
    return [whole_state(value) for value in state] if isinstance(state, list) else state
