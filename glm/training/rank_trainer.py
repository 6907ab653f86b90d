"""SFT and reward model on several GPUs: a `StepTrainer` in each process, here by DDP; fsdp.py and zero3.py stand on it.

All processes load the same steps, and each computes its share of a step's tokens. The loss is divided by the items of
the whole step, so that it is the mean over them however they are shared out; the engines take the mean of gradients
over processes, which is why the loss is multiplied by their number.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from glm.training.distributed import deal, rank, world_size
from glm.training.packing import Packing, token_count
from glm.training.trainer import Collator, StepTrainer


class Share:
    """What this process computes of a step: as many micro-batches as every other one, since they wait for each other.

    Where it has fewer, it computes one again for nothing: `idle` is how many at the end do not count. All counts are
    those of the whole step.
    """

    def __init__(self, collator: Collator, packing: Packing | None) -> None:
        self.collator = collator
        self.packing = packing

    def __call__(self, step: list[Any]) -> dict[str, Any]:
        parts = [self.collator(share) for share in shares(step, world_size(), self.packing) if share]
        own = parts[rank()]["micro_batches"] if rank() < len(parts) else []
        most = max(len(part["micro_batches"]) for part in parts)
        spare = (own or parts[0]["micro_batches"])[-1]
        counts = {name: sum(part[name] for part in parts) for name in ("items", "tokens", "examples")}
        return counts | {"micro_batches": own + [spare] * (most - len(own)), "idle": most - len(own)}


def shares(step: list[Any], number: int, packing: Packing | None) -> list[list[Any]]:
    """The items of a step, dealt out so that all are ready at the same time; the last ones may get nothing.

    Packed examples are dealt by the tokens that are computed of them. Rows that `PackedRows` has filled stay together
    if their number allows it. Padded ones go round by length, so that all have as many, and of like lengths.
    """
    if isinstance(step[0], list) and len(step) % number:
        step = [example for row in step for example in row]
    sizes = [token_count(item, packing) for item in step]
    if packing is not None:
        dealt = deal(sizes, number)
    else:
        order = sorted(range(len(step)), key=lambda index: sizes[index], reverse=True)
        dealt = [order[first::number] for first in range(number)]
    return [[step[index] for index in indices] for indices in dealt]


class RankTrainer(StepTrainer):
    """A `StepTrainer` that is one of several; `data_collator` is a `Share`."""

    has_shares = False  # whether this process has a share of each weight only, once the training has begun

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if rank() > 0:
            torch.manual_seed(self.args.seed + rank())  # dropout's noise is each process's own

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
        )
        # As the Trainer has it prepared in one process: every process sees whole steps, in the order of the seed.
        return prepare_data_loader(
            loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=self.args.data_seed
        )

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        micro_batches = inputs["micro_batches"]
        counted = len(micro_batches) - inputs["idle"]
        for number, micro_batch in enumerate(micro_batches, start=1):
            wait = number < len(micro_batches) and not self.has_shares  # nor of gradients is there more than a share
            with model.no_sync() if wait else nullcontext():
                loss = model(**self._prepare_inputs(micro_batch)) / inputs["items"]
                if number > counted:
                    loss = loss * 0
                self._backward(loss * world_size())
            total += loss.detach()
        dist.all_reduce(total)
        return total

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _loss_of(self, batch: dict[str, Any]) -> float:
        counted = len(batch["micro_batches"]) - batch["idle"]
        losses = [self.model(**self._prepare_inputs(part)) for part in batch["micro_batches"]]
        total = torch.stack(losses)[:counted].sum()
        dist.all_reduce(total)
        return total.item()

    def _see_a_gradient(self, model: nn.Module) -> None:
        if not self.has_shares:  # of whole weights there always is one
            super()._see_a_gradient(model)

    def _try_largest(self) -> None:
        if not self.has_shares:  # weights are whole until the training begins
            super()._try_largest()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if rank() == 0:
            super()._load_rng_state(checkpoint)
