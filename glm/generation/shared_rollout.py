"""A batch of prompts answered by several processes together, as one process would answer it.

Each process decodes its share of the rows. Sampling noise is drawn for all rows that one process would still have in
its batch, and each takes its own: so an answer does not depend on how many processes there are, and torch's generators
stay in step. Every `LOOK_EVERY` tokens the processes tell each other which rows have ended.
"""

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from glm.generation.decode_step import State
from glm.generation.rollout import LOOK_EVERY, Decoder, first_rows, graph_size, keep_rows, put_rows, written


class SharedDecoder(Decoder):
    """The `Decoder` of one of several processes. All call `sample` with the same prompts and get all answers."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__(model)
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        self.most = 0  # rows of the largest batch
        self.alive: list[int] = []  # the rows of the batch that one process would hold, in its order
        self.places = torch.zeros(0, dtype=torch.long)  # where the rows of this process stand among them

    def reserve(self, rows: int, columns: int, new_tokens: int) -> None:
        """Make room for this process's share of so many rows."""
        self.most = max(self.most, rows)
        super().reserve(-(-rows // self.count), columns, new_tokens)

    def _decode(
        self, prompts: list[list[int]], max_new_tokens: int, do_sample: bool, end: int, pad: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        mine = list(range(self.number, len(prompts), self.count))
        taken = mine or [0]  # without a row of its own, a process computes another's, to stay in step
        device = self.model.device
        self.alive = list(range(len(prompts)))
        self.places = torch.tensor(taken, device=device)
        size = self._graph_size(len(taken))
        self._prefill([prompts[row] for row in taken], size, do_sample, end, pad)
        state = first_rows(self.state, size)
        found = [part.new_zeros(len(prompts), max_new_tokens) for part in written(state)]
        rows = self.places.clone()  # which prompt stands in which row
        ended = torch.zeros(len(prompts), dtype=torch.int32, device=device)
        for count in range(1, max_new_tokens):
            if count % LOOK_EVERY == 0:
                ended[rows] = state.done[: len(rows)].int()
                dist.all_reduce(ended, op=dist.ReduceOp.MAX)
                if ended.all():
                    break
                self._drop(ended)
                alive = (~state.done[: len(rows)]).nonzero().squeeze(-1)
                if len(alive) > 0 and self._graph_size(len(alive)) < size:
                    put_rows(found, rows, state, max_new_tokens)
                    rows, size = rows[alive], self._graph_size(len(alive))
                    keep_rows(state, alive)
                    state = first_rows(self.state, size)
                where = {row: place for place, row in enumerate(self.alive)}
                self.places = torch.tensor([where.get(row, 0) for row in rows.tolist()], device=device)
            if do_sample:
                self._draw(state)
            self._advance(size, state, end, pad)
        put_rows(found, rows, state, max_new_tokens)
        for part in found:
            if not mine:
                part.zero_()
            dist.all_reduce(part)
        return found[0], found[1], found[2]

    def _drop(self, ended: Tensor) -> None:
        """Let the rows that have ended leave the batch if they would leave it in one process."""
        over = ended.tolist()
        alive = [row for row in self.alive if not over[row]]
        if self._size_of_one(len(alive)) < self._size_of_one(len(self.alive)):
            self.alive = alive

    def _draw(self, state: State) -> None:
        everyone = state.noise.new_empty(self._size_of_one(len(self.alive)), state.noise.shape[1]).exponential_()
        state.noise[: len(self.places)] = everyone[self.places]

    def _size_of_one(self, rows: int) -> int:
        """Rows that one process would run a step with."""
        return graph_size(rows, self.most) if self.on_gpu else rows
