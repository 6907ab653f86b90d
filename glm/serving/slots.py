"""A batch whose rows join and leave between two tokens: a cache with one slot for each of them.

    slots = Slots(model, rows=32, columns=2048)
    logits = slots.admit([prompt, other])     # two rows; what follows each prompt
    logits = slots.step([token, token])       # and what follows one more token of each
    slots.drop([0])                           # the other one is row 0 now

The layers are those of `glm.generation.decode_step`; here each row has its own column to write to. Live rows stand at
the front, and attention looks at as many columns as the longest of them has. On a GPU a step is a CUDA graph, one for
each of a few numbers of rows and columns, made by `warm_up`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from transformers import GlmForCausalLM

from glm.data.collate import pad_ids
from glm.generation import decode_step

COLUMNS = 64  # on the CPU attention's width is a multiple of it
GRAPH_COLUMNS = 256  # on a GPU the widths are this and its doublings, each with graphs of its own
PREFILL_TOKENS = 8192  # prompt tokens, padding counted, of one forward pass


@dataclass
class Graph:
    """A recorded step and its places for what goes in and comes out."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [rows]
    positions: Tensor  # [rows]
    logits: Tensor  # [rows, vocabulary]


class Slots:
    """Decodes with one Glm model that `decode_step.supports`, under the LoRA that was active when it last looked."""

    def __init__(self, model: GlmForCausalLM, *, rows: int, columns: int) -> None:
        self.model = model
        self.rows, self.columns = rows, columns
        self.on_gpu = model.device.type == "cuda"
        self.block = decode_step.decode_block
        if self.on_gpu:
            self.block = torch.compile(decode_step.decode_block, fullgraph=True, dynamic=False)
        self.follow_adapter()
        config = model.config
        cache = (rows, config.num_key_value_heads, columns, config.head_dim)
        blocks = range(config.num_hidden_layers)
        self.keys = [torch.zeros(cache, dtype=model.dtype, device=model.device) for _ in blocks]
        self.values = [torch.zeros(cache, dtype=model.dtype, device=model.device) for _ in blocks]
        self.lengths: list[int] = []  # tokens in the cache, of each live row

    def follow_adapter(self) -> None:
        """Take up the model's weights with the LoRA that is active now, or none; no row is live."""
        self.graphs: dict[tuple[int, int], Graph] = {}  # they hold the old tensors
        weights = decode_step.gather_weights(self.model)
        self.weights = decode_step.with_rotary_tables(weights, self.model, self.columns)
        decode_step.follow_adapter(self.weights, self.model)

    @torch.no_grad()
    def admit(self, prompts: list[list[int]]) -> Tensor:
        """Put prompts (token ids) into rows behind the live ones; logits [prompts, vocabulary] of what follows.

        Each prompt leaves room for at least one more token in its row.
        """
        logits = []
        at_once = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        for start in range(0, len(prompts), at_once):
            logits.append(self._prefill(prompts[start : start + at_once]))
        return torch.cat(logits)

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        device = self.model.device
        batch = pad_ids(prompts, self.model.config.pad_token_id or 0, "right")
        with torch.compiler.set_stance("force_eager"):
            out = self.model.base_model(**{name: part.to(device) for name, part in batch.items()}, use_cache=True)
        begin, width = len(self.lengths), batch["input_ids"].shape[1]
        rows = slice(begin, begin + len(prompts))
        for layer, keys, values in zip(out.past_key_values.layers, self.keys, self.values, strict=True):
            keys[rows, :, :width] = layer.keys  # beyond a prompt's end: never visible before it is written again
            values[rows, :, :width] = layer.values
        lengths = [len(prompt) for prompt in prompts]
        self.lengths += lengths
        ends = torch.tensor(lengths, device=device) - 1
        last = out.last_hidden_state[torch.arange(len(prompts), device=device), ends]
        return linear(last, self.weights.head)

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """Append a token to each live row; logits [live rows, vocabulary] of what follows."""
        live, device = len(tokens), self.model.device
        if not self.on_gpu:
            width = min(-(-(max(self.lengths) + 1) // COLUMNS) * COLUMNS, self.columns)
            logits = self._advance(torch.tensor(tokens), torch.tensor(self.lengths), width)
        else:
            graph = self._graph(live, max(self.lengths) + 1)
            # Rows beyond the live ones write into their first column, which a prompt will write again.
            idle = [0] * (len(graph.tokens) - live)
            graph.tokens.copy_(torch.tensor(tokens + idle).to(device, non_blocking=True))
            graph.positions.copy_(torch.tensor(self.lengths + idle).to(device, non_blocking=True))
            graph.graph.replay()
            logits = graph.logits[:live]
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def drop(self, rows: list[int]) -> None:
        """Take rows out; the last live rows move into their places, in this order: highest row first."""
        for row in sorted(rows, reverse=True):
            last = len(self.lengths) - 1
            if row != last:
                length = self.lengths[last]
                for cache in (*self.keys, *self.values):
                    cache[row, :, :length] = cache[last, :, :length]
                self.lengths[row] = self.lengths[last]
            self.lengths.pop()

    def clear(self) -> None:
        """Take all rows out."""
        self.lengths.clear()

    def warm_up(self) -> None:
        """On a GPU, compile and record the step at all sizes, so that no request waits for it."""
        if self.on_gpu:
            for rows in self._graph_rows():
                for columns in self._graph_columns():
                    self._graph(rows, columns)

    def _advance(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        config, weights, rows = self.model.config, self.weights, len(tokens)
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        visible = torch.arange(width, device=tokens.device) <= positions[:, None]
        rotary = weights.cos[positions][:, None], weights.sin[positions][:, None]
        hidden = embedding(tokens, weights.embedding)
        bias = hidden.new_zeros(visible.shape).masked_fill(~visible, float("-inf"))
        bias = bias[:, None, None].expand(rows, groups, heads // groups, width)
        place = positions[:, None, None, None].expand(rows, groups, 1, size)
        change = torch.zeros_like(hidden)
        for block, keys, values in zip(weights.blocks, self.keys, self.values, strict=True):
            hidden, change = self.block(
                hidden,
                change,
                block,
                keys[:rows, :, :width],
                values[:rows, :, :width],
                place,
                rotary,
                bias,
                self.model.model.layers[0].mlp.activation_fn,
                config.rms_norm_eps,
            )
        return linear(decode_step.rms_norm(hidden + change, weights.norm, config.rms_norm_eps), weights.head)

    def _graph(self, rows: int, columns: int) -> Graph:
        """The recorded step with room for this many rows and columns."""
        size = (
            next(count for count in self._graph_rows() if count >= rows),
            next(count for count in self._graph_columns() if count >= columns),
        )
        if size not in self.graphs:
            self.graphs[size] = self._record(*size)
        return self.graphs[size]

    def _graph_rows(self) -> list[int]:
        return sorted({max(1, self.rows // 4), self.rows})

    def _graph_columns(self) -> list[int]:
        widths = [GRAPH_COLUMNS]
        while widths[-1] < self.columns:
            widths.append(widths[-1] * 2)
        return [*widths[:-1], self.columns]

    def _record(self, rows: int, width: int) -> Graph:
        device = self.model.device
        tokens = torch.zeros(rows, dtype=torch.long, device=device)
        # Warming up and recording write at these positions: behind the live rows' tokens, where nothing is visible.
        lengths = [*self.lengths, *[0] * rows][:rows]
        positions = torch.tensor(lengths, device=device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Every number of rows and columns is a compiled form of its own: more of them than dynamo allows by default.
        unlimited = torch._dynamo.config.patch(recompile_limit=64)
        with torch.no_grad(), torch.cuda.stream(stream), unlimited:
            for _ in range(3):
                self._advance(tokens, positions, width)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad(), torch.cuda.graph(graph):
            logits = self._advance(tokens, positions, width)
        return Graph(graph, tokens, positions, logits)
