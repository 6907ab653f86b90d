"""transformers' Glm layer under LoRA, for training on packed rows: the same function in fewer and cheaper steps.

q, k and v are one product, and so are their LoRAs. In float32 on a CPU, where it costs no accuracy, a LoRA is added to
the weight before the product instead of to each token's output after it. The last layer goes on with the positions
that the loss asks for and leaves out the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import GlmForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb, eager_attention_forward

from glm.models.adapters import last_hidden
from glm.models.glm_linears import active_loras, base_of, is_plain, linears_of
from glm.models.prefix import prefix_of
from glm.training.product import on_cpu, product


class Lora(NamedTuple):
    """A adds up B A to a weight, times scaling."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]
    scaling: float


class Projection(NamedTuple):
    """Linear maps of one input, side by side: their frozen weights as one, and the LoRAs of each of them."""

    weight: Tensor  # [out, in]
    bias: Tensor | None
    sizes: list[int]  # outputs of each map
    loras: list[list[Lora]]


class Block(NamedTuple):
    """The linear maps of a decoder layer."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    is_last: bool


def can_fuse(model: PreTrainedModel, *, dropout: bool = True) -> bool:
    """Whether `fused_layer` computes the layers of this model: Glm, frozen but for plain LoRAs without dropout.

    `dropout`: whether that of the LoRAs would be applied.
    """
    if type(model) is not GlmForCausalLM or prefix_of(model) is not None:
        return False
    linears = [linear for layer in model.model.layers for linear in linears_of(layer)]
    if not all(map(is_plain, linears)):
        return False
    dropouts = [linear.lora_dropout[name] for linear in linears for name in active_loras(linear)]
    frozen = [parameter for name, parameter in model.model.layers.named_parameters() if ".lora_" not in name]
    none_acts = not dropout or all(isinstance(each, nn.Identity) for each in dropouts)
    return none_acts and not any(parameter.requires_grad for parameter in frozen)


@contextmanager
def fused_blocks(layers: list[nn.Module]) -> Iterator[list[Block]]:
    """The blocks of these layers. Inside, q, k and v of a layer share one piece of memory, so that none is copied."""
    blocks = blocks_of(layers, put_side_by_side(layers))
    try:
        yield blocks
    finally:
        for layer in layers:
            for linear in map(base_of, linears_of(layer)[:3]):
                linear.weight.data = linear.weight.data.clone()


def put_side_by_side(layers: list[nn.Module]) -> list[Tensor]:
    """Have q, k and v of each layer share one piece of memory; returns these weights, [q + k + v outputs, in]."""
    joint = []
    for layer in layers:
        bases = [base_of(linear) for linear in linears_of(layer)[:3]]
        joint.append(torch.cat([base.weight.data for base in bases]))
        for base, rows in zip(bases, joint[-1].split([base.out_features for base in bases]), strict=True):
            base.weight.data = rows
    return joint


def blocks_of(layers: list[nn.Module], joint: list[Tensor]) -> list[Block]:
    """The layers' blocks under the LoRAs that are active now; `joint` is of `put_side_by_side`."""
    blocks = []
    for layer, weight in zip(layers, joint, strict=True):
        q, k, v, out, gate_up, down = linears_of(layer)
        qkv = _side_by_side([q, k, v], weight)
        blocks.append(Block(qkv, _alone(out), _alone(gate_up), _alone(down), layer is layers[-1]))
    return blocks


def fused_layer(
    layer: nn.Module,
    block: Block,
    hidden_states: Tensor,
    attention_mask: Any = None,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: None = None,
    keep: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What the layer's own forward gives for hidden states [1, length, hidden]; the last layer at `keep` [n] only."""
    attention, length = layer.self_attn, hidden_states.shape[1]
    query, key, value = (
        states.view(1, length, -1, attention.head_dim).transpose(1, 2)
        for states in _project(layer.input_layernorm(hidden_states), block.qkv).split(block.qkv.sizes, dim=-1)
    )
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    attended, _ = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs)
    attended = attended.reshape(1, length, -1)
    if block.is_last and keep is not None:  # in this order: compiled code of other layers must not depend on `keep`
        attended, hidden_states = attended[:, keep], hidden_states[:, keep]
    hidden_states = hidden_states + _project(attended, block.out)
    gate, up = _project(layer.post_attention_layernorm(hidden_states), block.gate_up).chunk(2, dim=-1)
    return hidden_states + _project(up * layer.mlp.activation_fn(gate), block.down)


def hidden_at(model: PeftModel | PreTrainedModel, positions: Tensor, *, fused: bool, **inputs: Any) -> Tensor:
    """Last hidden states [n, hidden] at `positions` [n] of the flattened rows; fused layers compute no others."""
    if positions.is_cuda:  # the number of both is another one in every row
        torch._dynamo.maybe_mark_dynamic(positions, 0)
        if "key_sources" in inputs:
            torch._dynamo.maybe_mark_dynamic(inputs["key_sources"], 0)
    if not fused:
        return last_hidden(model, **inputs).flatten(0, 1)[positions]
    return last_hidden(model, keep=positions, **inputs)[0]


def _side_by_side(linears: list[nn.Module], weight: Tensor) -> Projection:
    bases = [base_of(linear) for linear in linears]
    sizes = [base.out_features for base in bases]
    bias = None if bases[0].bias is None else torch.cat([base.bias.data for base in bases])
    return Projection(weight, bias, sizes, [_loras(linear) for linear in linears])


def _alone(linear: nn.Module) -> Projection:
    base = base_of(linear)
    return Projection(base.weight, base.bias, [base.out_features], [_loras(linear)])


def _loras(linear: nn.Module) -> list[Lora]:
    return [
        Lora(linear.lora_A[name].weight, linear.lora_B[name].weight, linear.scaling[name])
        for name in active_loras(linear)
    ]


def _project(inputs: Tensor, projection: Projection) -> Tensor:
    weight, bias, sizes, loras = projection
    if not any(loras):
        return F.linear(inputs, weight, bias)
    down = torch.cat([lora.down for each in loras for lora in each])
    up = torch.block_diag(
        *(
            torch.cat([weight.new_empty(size, 0, dtype=down.dtype), *(lora.up * lora.scaling for lora in each)], dim=1)
            for size, each in zip(sizes, loras, strict=True)
        )
    )
    if on_cpu(weight):
        return _Merged.apply(inputs, weight, bias, down, up)
    return F.linear(inputs, weight, bias) + F.linear(F.linear(inputs, down), up)


class _Merged(torch.autograd.Function):
    """inputs @ (weight + up @ down).T + bias; `weight` and `bias` get no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight, down, up)
        return product(inputs, torch.addmm(weight, up, down), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs, weight, down, up = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        of_inputs = product(gradients[0], torch.addmm(weight, up, down).t()) if wanted else None
        inputs, gradient = inputs.flatten(0, -2), gradients[0].flatten(0, -2)
        of_down = product(product(gradient, up.t()).t(), inputs.t())
        of_up = product(product(inputs, down).t(), gradient.t()).t()
        return of_inputs, None, None, of_down, of_up
