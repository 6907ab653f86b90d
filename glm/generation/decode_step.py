"""One new token for every row of a batch: transformers' Glm block as a function of plain tensors.

It computes what `GlmForCausalLM` computes (tests compare token ids and log-probabilities), in a form that
`torch.compile` and a CUDA graph can hold: all shapes are fixed, the state changes in place, nothing waits for the host.
Three things make it cheaper than the library's step. q, k and v are one matrix, with the active LoRA folded in.
The query heads that share a key head stand in the sequence axis of the attention, so that a key is read once and not
once for each of them. And no log-softmax over the vocabulary is kept: the chosen token's log-probability is its logit
minus the log-sum-exp.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers import GlmForCausalLM
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

from glm.models.glm_linears import active_loras, base_of, is_plain, linears_of
from glm.models.prefix import prefix_of


class Projection(NamedTuple):
    """A linear map; a LoRA rides beside the weight, since a merged copy of every matrix would double the model."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    down: Tensor | None  # A [rank, in]
    up: Tensor | None  # B times its scaling [out, rank]


class Block(NamedTuple):
    """The tensors of one decoder layer."""

    input_norm: Tensor
    qkv: Projection
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection


class Weights(NamedTuple):
    """The tensors of a model, and the rotary tables [length, rotated dimensions]."""

    embedding: Tensor
    blocks: list[Block]
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    value: Tensor  # [1, hidden] float32, zero where no value is wanted


class State(NamedTuple):
    """A batch under way. Shapes: n rows, c columns of the cache, t new tokens at most, v vocabulary entries."""

    token: Tensor  # [n] the last chosen token, not yet in the cache
    column: Tensor  # [1] where its key and value go, for all rows: prompts end at the same column
    start: Tensor  # [n] the column of each row's first token
    done: Tensor  # [n] the row has ended
    index: Tensor  # [1] which new token comes next
    noise: Tensor  # [n, v] exponential draws; all ones for the most probable token
    temperature: Tensor  # [1]
    keys: list[Tensor]  # a layer: [n, key heads, c, head size]
    values: list[Tensor]
    tokens: Tensor  # [n, t] what was chosen
    logprobs: Tensor  # [n, t]
    state_values: Tensor  # [n, t] the value head on the hidden state that chose the token


class Step:
    """`step` and `choose`, compiled or as they are written.

    What is compiled is one block: all blocks are alike, so that it is made once (the whole model takes a minute), and a
    CUDA graph takes away what the calls in between cost.
    """

    def __init__(self, model: GlmForCausalLM, *, compiled: bool) -> None:
        self.config = model.config
        self.activation = model.model.layers[0].mlp.activation_fn
        self.block = torch.compile(decode_block, fullgraph=True) if compiled else decode_block
        self.choose = torch.compile(choose, fullgraph=True) if compiled else choose

    def __call__(self, weights: Weights, state: State, end: int, pad: int) -> None:
        """Put the last tokens into the cache and choose the next ones."""
        config = self.config
        heads, groups, columns = config.num_attention_heads, config.num_key_value_heads, state.keys[0].shape[2]
        place = torch.arange(columns, device=state.token.device)
        visible = (place >= state.start[:, None]) & (place <= state.column)
        position = state.column - state.start
        rotary = weights.cos[position][:, None], weights.sin[position][:, None]  # [n, 1, rotated]
        hidden = F.embedding(state.token, weights.embedding)
        bias = hidden.new_zeros(visible.shape).masked_fill(~visible, float("-inf"))
        bias = bias[:, None, None].expand(len(bias), groups, heads // groups, columns)
        change = torch.zeros_like(hidden)
        for block, keys, values in zip(weights.blocks, state.keys, state.values, strict=True):
            hidden, change = self.block(
                hidden, change, block, keys, values, state.column, rotary, bias, self.activation, config.rms_norm_eps
            )
        self.choose(weights, state, rms_norm(hidden + change, weights.norm, config.rms_norm_eps), end, pad)


def decode_block(
    hidden: Tensor,
    change: Tensor,
    block: Block,
    keys: Tensor,
    values: Tensor,
    column: Tensor,
    rotary: tuple[Tensor, Tensor],
    bias: Tensor,
    activation: nn.Module,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """One decoder layer on hidden states [n, hidden], to which the `change` by the layer before is yet to be added.

    `column` says where key and value go: [1], the same for all rows, or [n, key heads, 1, head size], each row's own.
    """
    hidden = hidden + change
    rows, groups, shared, _ = bias.shape
    size = keys.shape[-1]
    normed = rms_norm(hidden, block.input_norm, eps)
    query, key, value = _project(normed, block.qkv).split(
        [groups * shared * size, groups * size, groups * size], dim=-1
    )
    query, key = query.view(rows, groups * shared, 1, size), key.view(rows, groups, 1, size)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    value = value.view(rows, groups, 1, size)
    if column.dim() == 1:
        keys.index_copy_(2, column, key)
        values.index_copy_(2, column, value)
    else:
        keys.scatter_(2, column, key)
        values.scatter_(2, column, value)
    query = query.reshape(rows, groups, shared, size)  # the heads that share a key, where a sequence would be
    attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
    hidden = hidden + _project(attended.reshape(rows, -1), block.out)
    gate, up = _project(rms_norm(hidden, block.mlp_norm, eps), block.gate_up).chunk(2, dim=-1)
    return hidden, _project(up * activation(gate), block.down)


def choose(weights: Weights, state: State, hidden: Tensor, end: int, pad: int) -> None:
    """Draw a token from the last layer's hidden states [n, hidden], write it down and move on by one column.

    argmax(logit - log E) with E ~ Exp(1) is a draw from softmax(logits): the Gumbel-max trick (Maddison et al. 2014).
    """
    logits = F.linear(hidden, weights.head).float() / state.temperature
    chosen = (logits - state.noise.log()).argmax(-1)
    logprob = logits.gather(-1, chosen[:, None]) - logits.logsumexp(-1, keepdim=True)
    token = torch.where(state.done, pad, chosen)
    state.token.copy_(token)
    state.tokens.index_copy_(1, state.index, token[:, None])
    state.logprobs.index_copy_(1, state.index, logprob)
    state.state_values.index_copy_(1, state.index, F.linear(hidden.float(), weights.value))
    state.done.logical_or_(token == end)
    state.index.add_(1)
    state.column.add_(1)


def supports(model: nn.Module) -> bool:
    """Whether `gather_weights` can take this causal LM apart: transformers' Glm in one dtype, bare or under LoRA."""
    if type(model) is not GlmForCausalLM or prefix_of(model) is not None:
        return False
    linears = [linear for layer in model.model.layers for linear in linears_of(layer)]
    if len({parameter.dtype for name, parameter in model.named_parameters() if ".lora_" not in name}) > 1:
        return False
    return type(model.lm_head) is nn.Linear and all(map(is_plain, linears))


@torch.no_grad()
def gather_weights(model: GlmForCausalLM) -> Weights:
    """The tensors of `model`, without rotary tables. Only q, k, v and the LoRA matrices are copies."""
    blocks = []
    for layer in model.model.layers:
        q, k, v, out, gate_up, down = linears_of(layer)
        fused = torch.cat([base_of(linear).weight for linear in (q, k, v)])
        biases = [base_of(linear).bias for linear in (q, k, v)]
        bias = None if biases[0] is None else torch.cat(biases)
        qkv = Projection(fused, bias, None, None)
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        blocks.append(Block(norms[0], qkv, _beside(out), norms[1], _beside(gate_up), _beside(down)))
    embedding = model.model.embed_tokens.weight
    none = embedding.new_empty(0)
    value = torch.zeros(1, embedding.shape[1], device=embedding.device)
    return Weights(embedding, blocks, model.model.norm.weight, model.lm_head.weight, none, none, value)


@torch.no_grad()
def with_rotary_tables(weights: Weights, model: GlmForCausalLM, length: int) -> Weights:
    """The same tensors, with rotary tables for `length` columns."""
    positions = torch.arange(length, device=weights.embedding.device)[None]
    cos, sin = model.model.rotary_emb(weights.embedding, positions)
    return weights._replace(cos=cos[0], sin=sin[0])


@torch.no_grad()
def follow_adapter(weights: Weights, model: GlmForCausalLM) -> None:
    """Bring the copies up to date with the model's own weights, and with the adapter that is active now, or none.

    The model's tensors stay untouched.
    """
    for layer, block in zip(model.model.layers, weights.blocks, strict=True):
        q, k, v, *others = linears_of(layer)
        sizes = [base_of(linear).out_features for linear in (q, k, v)]
        for linear, rows in zip((q, k, v), block.qkv.weight.split(sizes), strict=True):
            name = _active(linear)
            weight = base_of(linear).weight
            rows.copy_(weight if name is None else weight + linear.get_delta_weight(name))
        if block.qkv.bias is not None:  # trained by full, and by freeze of qkv
            block.qkv.bias.copy_(torch.cat([base_of(linear).bias for linear in (q, k, v)]))
        for linear, projection in zip(others, (block.out, block.gate_up, block.down), strict=True):
            if projection.down is None or projection.up is None:
                continue
            projection.down.zero_()
            projection.up.zero_()
            name = _active(linear)
            if name is not None:
                rank = linear.r[name]
                projection.down[:rank] = linear.lora_A[name].weight
                projection.up[:, :rank] = linear.lora_B[name].weight * linear.scaling[name]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019, as GlmRMSNorm: the mean in float32."""
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def _project(inputs: Tensor, projection: Projection) -> Tensor:
    out = F.linear(inputs, projection.weight, projection.bias)
    if projection.down is None or projection.up is None:
        return out
    return out + F.linear(F.linear(inputs, projection.down), projection.up)


def _beside(linear: nn.Module) -> Projection:
    """The projection of a linear, with room for the largest of its LoRAs."""
    base = base_of(linear)
    if not isinstance(linear, lora.Linear):
        return Projection(base.weight, base.bias, None, None)
    rank = max(linear.r.values())
    down = base.weight.new_zeros(rank, base.in_features)
    return Projection(base.weight, base.bias, down, base.weight.new_zeros(base.out_features, rank))


def _active(linear: nn.Module) -> str | None:
    """The name of the LoRA that a forward pass would use here."""
    names = active_loras(linear)
    if len(names) > 1:
        raise ValueError(f"several adapters are active: {names}; the decoder follows one")
    return names[0] if names else None
