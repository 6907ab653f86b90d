"""Full tuning by FSDP2: weights, gradients and moments shared out over processes, layer by layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from glm.training.layers import decoder_layers
from glm.training.rank_trainer import RankTrainer
from glm.training.sharding import whole_state


class FsdpTrainer(RankTrainer):
    """A `RankTrainer` whose weights torch shares out when the training begins.

    By torch's own function, since accelerate leaves a model on the CPU, where it can be tested, as it is.
    """

    has_shares = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        for layer in decoder_layers(self.model):
            fully_shard(layer)
        fully_shard(self.model)
        return super().create_optimizer(model)

    def _trained_state(self) -> dict[str, Any]:
        return whole_state(super()._trained_state())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.resumed["optimizer"] = share_moments(self.resumed["optimizer"], self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)


def share_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state of `optimizer`, such as one process saves, as this process's share of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        index: {name: share_like(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    return {**state, "state": shares}


def share_like(value: Tensor, parameter: DTensor) -> Tensor:
    """This process's share of `value`, if it has the shape of `parameter`, as moments have and their count has not."""
    if value.shape != parameter.shape:
        return value
    there = value.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)
