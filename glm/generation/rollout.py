"""Batched decoding for rollouts: a static cache, sampling on the device, log-probabilities and values on the way.

    decoder = Decoder(model)
    samples = decoder.sample(prompts, tokenizer, max_new_tokens=128, batch_size=64, do_sample=True)

It follows the adapter that is active, whatever it is, without touching the model. On a GPU the step is compiled once
and replayed as one CUDA graph (`glm.generation.decode_step`); on the CPU the same step runs as it is written. Models
that `decode_step.supports` does not know, ChatGLM-6B say, are left to `glm.generation.decode`.

Rows that have ended leave the batch: on the CPU at every look, on a GPU when half are gone, since one graph holds one
batch size and the weights are read for one row as for sixty.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GlmForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from glm.data.collate import pad_ids
from glm.data.encode import end_id
from glm.generation import decode_step
from glm.generation.decode_step import State

LOOK_EVERY = 8  # tokens between two looks at which rows have ended: each look waits for the device
COLUMNS = 64  # the cache's length is a multiple: attention kernels want it, and graphs are made again less often
PREFILL_TOKENS = 16384  # prompt tokens, padding counted, of one forward pass
SMALLEST_GRAPH = 8


@dataclass
class Samples:
    """Answers to n prompts, in their order; a tokens of the longest one."""

    answers: list[list[int]]  # ids after the prompt, with the end token where one was reached
    logprobs: Tensor  # [n, a] float32: log-probability of each token at the temperature; 0 beyond the end
    values: Tensor  # [n, a] float32: the value head on the state before each token; 0 beyond the end


class Decoder:
    """Decodes with one Glm model; keeps cache, compiled step and graphs from call to call."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model: GlmForCausalLM = model.get_base_model() if isinstance(model, PeftModel) else model
        if not decode_step.supports(self.model):
            raise ValueError(f"{type(self.model).__name__} with these adapters cannot be decoded here")
        self.on_gpu = self.model.device.type == "cuda"
        self.step = decode_step.Step(self.model, compiled=self.on_gpu)
        self.weights = decode_step.gather_weights(self.model)
        self.size = (0, 0, 0)  # rows, columns and new tokens that there is room for
        self.state: State
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        batch_size: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        value_head: nn.Linear | None = None,
    ) -> Samples:
        """Answer token-id prompts under the active adapter; the model must be in evaluation mode.

        Greedy by default. Sampling draws from the whole distribution with torch's global generator of the device.
        Prompts are batched by length. `value_head` is Linear(hidden → 1); without one the values are 0.
        """
        rows = batch_size if self.on_gpu else min(batch_size, len(prompts))
        self.reserve(rows, max(map(len, prompts)) + max_new_tokens, max_new_tokens)
        decode_step.follow_adapter(self.weights, self.model)
        self.weights.value.zero_() if value_head is None else self.weights.value.copy_(value_head.weight)
        self.state.temperature.fill_(temperature if do_sample else 1.0)
        end, pad = end_id(tokenizer), tokenizer.pad_token_id
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found = [torch.zeros(len(prompts), max_new_tokens, dtype=part.dtype) for part in written(self.state)]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            parts = self._decode([prompts[index] for index in chosen], max_new_tokens, do_sample, end, pad)
            for whole, part in zip(found, parts, strict=True):
                whole[chosen] = part.cpu()
        tokens, logprobs, values = found
        answers = [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()]
        sizes = torch.tensor([len(answer) for answer in answers])
        width = int(sizes.max())
        real = torch.arange(width) < sizes[:, None]
        device = self.model.device
        return Samples(answers, (logprobs[:, :width] * real).to(device), (values[:, :width] * real).to(device))

    def _decode(
        self, prompts: list[list[int]], max_new_tokens: int, do_sample: bool, end: int, pad: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities, values of one batch, each [rows, max_new_tokens]; padded after the end."""
        size = self._graph_size(len(prompts))
        self._prefill(prompts, size, do_sample, end, pad)
        state = first_rows(self.state, size)
        found = [part.new_zeros(len(prompts), max_new_tokens) for part in written(state)]
        rows = torch.arange(len(prompts), device=self.model.device)  # which prompt stands in which row
        for count in range(1, max_new_tokens):
            if count % LOOK_EVERY == 0:
                alive = (~state.done[: len(rows)]).nonzero().squeeze(-1)
                if len(alive) == 0:
                    break
                if self._graph_size(len(alive)) < size:
                    put_rows(found, rows, state, max_new_tokens)
                    rows, size = rows[alive], self._graph_size(len(alive))
                    keep_rows(state, alive)
                    state = first_rows(self.state, size)
            if do_sample:
                self._draw(state)
            self._advance(size, state, end, pad)
        put_rows(found, rows, state, max_new_tokens)
        return found[0], found[1], found[2]

    def _prefill(self, prompts: list[list[int]], size: int, do_sample: bool, end: int, pad: int) -> None:
        """Put the prompts into the cache by the library's own forward pass, and choose the first tokens."""
        state = first_rows(self.state, size)
        width = max(map(len, prompts))
        state.start.fill_(width - 1)
        state.start[: len(prompts)] = torch.tensor([width - len(p) for p in prompts], device=state.start.device)
        state.done.fill_(True)  # rows beyond the prompts fill up the graph's size
        state.done[: len(prompts)] = False
        last = self.weights.embedding.new_zeros(size, self.weights.embedding.shape[1])
        at_once = max(1, PREFILL_TOKENS // width)
        for begin in range(0, len(prompts), at_once):
            part = slice(begin, min(begin + at_once, len(prompts)))
            batch = {name: value.to(state.token.device) for name, value in pad_ids(prompts[part], pad, "left").items()}
            shorter = width - batch["input_ids"].shape[1]
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            half = torch.autocast(self.model.device.type, torch.bfloat16, self.model.dtype == torch.bfloat16)
            with half, torch.compiler.set_stance("force_eager"):  # compiled blocks would be made again for the cache
                out = self.model.base_model(**batch, position_ids=positions, use_cache=True)
            last[part] = out.last_hidden_state[:, -1]
            for layer, keys, values in zip(out.past_key_values.layers, state.keys, state.values, strict=True):
                keys[part, :, shorter:width] = layer.keys
                values[part, :, shorter:width] = layer.values
            del out
        state.column.fill_(width - 1)
        state.index.zero_()
        self._draw(state) if do_sample else state.noise.fill_(1.0)
        decode_step.choose(self.weights, state, last, end, pad)

    def _draw(self, state: State) -> None:
        """New noise for every row."""
        state.noise.exponential_()

    def _advance(self, size: int, state: State, end: int, pad: int) -> None:
        """One step of the first `size` rows, by the graph of that size where there is a GPU."""
        if not self.on_gpu:
            self.step(self.weights, state, end, pad)
            return
        if size not in self.graphs:
            self.graphs[size] = self._capture(state, end, pad)
        self.graphs[size].replay()

    def _capture(self, state: State, end: int, pad: int) -> torch.cuda.CUDAGraph:
        """Compile the step, run it as a warm-up asks, put the state back as it was, and record it."""
        changing = [state.token, state.column, state.done, state.index, *written(state)]
        before = [part.clone() for part in changing]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with _undetermined():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step(self.weights, state, end, pad)
                    for part, kept in zip(changing, before, strict=True):
                        part.copy_(kept)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.step(self.weights, state, end, pad)
        return graph

    def _graph_size(self, rows: int) -> int:
        """Rows that a step is run with: as many as are alive, or the nearest halving of the batch that has a graph."""
        return graph_size(rows, self.size[0]) if self.on_gpu else rows

    def reserve(self, rows: int, columns: int, new_tokens: int) -> None:
        """Make room for this many rows of prompt and answer. Ask for the most at first: a GPU's graphs are tied to it.

        On a GPU room only grows; on the CPU it is what is asked for, which keeps the attention short.
        """
        columns = -(-columns // COLUMNS) * COLUMNS
        if self.on_gpu:
            rows, columns, new_tokens = (max(pair) for pair in zip(self.size, (rows, columns, new_tokens), strict=True))
        if self.size == (rows, columns, new_tokens):
            return
        self.graphs.clear()  # they hold the old tensors
        if any(self.size):
            del self.state
        self.size = (rows, columns, new_tokens)
        self.weights = decode_step.with_rotary_tables(self.weights, self.model, columns)
        config, device = self.model.config, self.model.device
        cache = (rows, config.num_key_value_heads, columns, config.head_dim)
        blocks = range(config.num_hidden_layers)
        self.state = State(
            token=torch.zeros(rows, dtype=torch.long, device=device),
            column=torch.zeros(1, dtype=torch.long, device=device),
            start=torch.zeros(rows, dtype=torch.long, device=device),
            done=torch.ones(rows, dtype=torch.bool, device=device),
            index=torch.zeros(1, dtype=torch.long, device=device),
            noise=torch.ones(rows, config.vocab_size, device=device),
            temperature=torch.ones(1, device=device),
            keys=[torch.zeros(cache, dtype=self.model.dtype, device=device) for _ in blocks],
            values=[torch.zeros(cache, dtype=self.model.dtype, device=device) for _ in blocks],
            tokens=torch.zeros(rows, new_tokens, dtype=torch.long, device=device),
            logprobs=torch.zeros(rows, new_tokens, device=device),
            state_values=torch.zeros(rows, new_tokens, device=device),
        )


def graph_size(rows: int, most: int) -> int:
    """The nearest halving of `most` that has room for `rows`."""
    while most // 2 >= max(rows, SMALLEST_GRAPH):
        most //= 2
    return most


@contextmanager
def _undetermined() -> Iterator[None]:
    """Without deterministic algorithms: each place is written once, and by them every write would be a sort."""
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


def written(state: State) -> tuple[Tensor, Tensor, Tensor]:
    return state.tokens, state.logprobs, state.state_values


def first_rows(state: State, size: int) -> State:
    """Views of the first `size` rows."""
    return State(
        token=state.token[:size],
        column=state.column,
        start=state.start[:size],
        done=state.done[:size],
        index=state.index,
        noise=state.noise[:size],
        temperature=state.temperature,
        keys=[keys[:size] for keys in state.keys],
        values=[values[:size] for values in state.values],
        tokens=state.tokens[:size],
        logprobs=state.logprobs[:size],
        state_values=state.state_values[:size],
    )


def keep_rows(state: State, alive: Tensor) -> None:
    """Move the rows `alive` to the front; what they leave behind counts as ended."""
    for part in (state.token, state.start, *written(state), *state.keys, *state.values):
        part[: len(alive)] = part[alive]
    state.done[:] = True
    state.done[: len(alive)] = False


def put_rows(found: list[Tensor], rows: Tensor, state: State, new_tokens: int) -> None:
    """Write what stands in the state's first rows into the rows of the results that they belong to."""
    for whole, part in zip(found, written(state), strict=True):
        whole[rows] = part[: len(rows), :new_tokens]
