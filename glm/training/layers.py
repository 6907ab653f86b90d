"""How decoder layers run in training: compiled one by one, and keeping as many activations as memory allows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from glm.models.quantization import PackedLinear, lean_int8
from glm.training.fused_layer import Block, fused_blocks, fused_layer
from glm.training.loss import CHUNK_LOGITS

Checkpointing = Literal["none", "selective", "full"]
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
EAGER = 1.6
WIDENS = 1.25  # outputs an input from which a product counts as one that widens; q, k and v in one do not


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, the ones that transformers can checkpoint."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def layers_run(
    model: nn.Module, *, compiled: bool, checkpointing: Checkpointing, fused: bool = False
) -> Iterator[None]:
    """Inside, the decoder layers of `model` are computed as said; afterwards they are as before.

    One compiled function serves all layers, since they differ only in weights. "full" keeps a layer's input and
    computes the layer again in the backward pass; "selective" computes again what takes much room for its time: all
    but attention and the products that do not widen (of a GLM block: the MLP's first half and what is elementwise).
    `fused`: by `fused_layer`, for a model that `can_fuse`.
    """
    run: Callable[..., Tensor] = {"none": run_layer, "selective": _selective, "full": _full}[checkpointing]
    if compiled and checkpointing == "full" and quantized(model):
        # torch 2.11 loses the marks of what to compute again in bitsandbytes' functions, and keeps everything.
        run = partial(_full, run=torch.compile(run_layer))
    elif compiled:
        run = torch.compile(run)
    layers = decoder_layers(model)
    with (
        lean_int8(model),
        fused_blocks(layers) if fused else nullcontext([None] * len(layers)) as blocks,
        forwards_are(run, layers, blocks),
    ):
        yield


@contextmanager
def forwards_are(run: Callable[..., Tensor], layers: list[nn.Module], blocks: Sequence[Block | None]) -> Iterator[None]:
    """Inside, the forward of each of the `layers` is `run(layer, block, …)`."""
    for layer, block in zip(layers, blocks, strict=True):
        layer.forward = partial(run, layer, block)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds the weights of the decoder layers."""
    return any(type(module).__module__.startswith("bitsandbytes") for module in decoder_layers(model)[0].modules())


def choose_checkpointing(
    model: PreTrainedModel, tokens: int, state: int, *, compiled: bool, free: int, copied_keys: int = 0
) -> Checkpointing:
    """The first of none, selective, full whose estimate for rows of `tokens` tokens keeps within `free` bytes.

    `state` and `copied_keys` as for `memory_estimate`. Where even "full" does not fit, it is tried. "selective" is not
    for compiled bitsandbytes layers, see `layers_run`.
    """
    for mode in MODES:
        if mode == "selective" and compiled and quantized(model):
            continue
        if memory_estimate(model, tokens, state, mode, compiled=compiled, copied_keys=copied_keys) <= free:
            return mode
    return "full"


def optimizer_bytes(model: nn.Module, optim: str) -> int:
    """Bytes of the gradients, in float32, and the moments of all parameters that are trained."""
    each = {"adamw_torch_fused": 4 + 8, "adamw_8bit": 4 + 2, "adafactor": 4}[optim]
    return each * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def memory_estimate(
    model: PreTrainedModel, tokens: int, state: int, mode: Checkpointing, *, compiled: bool, copied_keys: int = 0
) -> int:
    """Bytes that a training step takes on top of the weights: kept activations, `state`, a layer's backward or loss.

    `state` are the bytes of `optimizer_bytes`; `copied_keys` the tokens whose keys and values attention keeps besides
    those of the row's own `tokens`, where answers share a prompt. Layers below the first one that is trained keep
    nothing, unless the embedding is trained. Without compiling, elementwise steps keep their inputs too, several of
    them in float32: about EAGER times as much.
    """
    layers = decoder_layers(model)
    hidden = model.config.hidden_size
    named = [(name, module) for name, module in layers[0].named_modules() if "lora_" not in name]
    linears = [module for _, module in named if isinstance(module, nn.Linear | PackedLinear)]
    adapted = [(name, module) for name, module in named if isinstance(module, LoraLayer)]
    products = sum(linear.out_features for linear in linears)
    narrow = sum(linear.out_features for linear in linears if linear.out_features <= linear.in_features)
    # A LoRA keeps its input, which q, k and v share, and with dropout one of its own.
    inputs = sum(width for _, width in {(name.rpartition(".")[0], module.in_features) for name, module in adapted})
    inputs += sum(module.in_features for _, module in adapted if _has_dropout(module))
    whole = (3 * hidden + products + inputs) * (1 if compiled else EAGER)  # residual stream, both norms, products
    # selective: a layer's input, attention's output, and the narrow products but for the last, which is only added
    kept = {"none": whole, "selective": hidden + narrow, "full": hidden}[mode]
    in_backward = whole if mode == "none" else 2 * whole  # gradients, and what is computed again
    size = 4 if model.dtype == torch.float32 else 2
    passing = max(tokens * size * in_backward, CHUNK_LOGITS * 16)
    heads = model.config.num_key_value_heads / model.config.num_attention_heads
    copies = copied_keys * 2 * hidden * heads if mode == "none" else 0
    return int(size * trained_depth(model, layers) * (tokens * kept + copies) + passing + state)


def trained_depth(model: PreTrainedModel, layers: list[nn.Module]) -> int:
    """Number of layers that the gradient passes through."""
    trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    within = sum(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    if within < sum(parameter.requires_grad for parameter in model.parameters()) or not any(trained):
        return len(layers)  # an embedding, or a prefix
    return len(layers) - trained.index(True)


def _has_dropout(module: LoraLayer) -> bool:
    return any(isinstance(dropout, nn.Dropout) for dropout in module.lora_dropout.values())


def run_layer(layer: nn.Module, block: Block | None, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's forward as it is, or by `fused_layer` with its `block`."""
    if block is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    return fused_layer(layer, block, hidden_states, *args, **kwargs)


def _full(
    layer: nn.Module,
    block: Block | None,
    hidden_states: Tensor,
    *args: Any,
    run: Callable[..., Tensor] = run_layer,
    **kwargs: Any,
) -> Tensor:
    def forward(states: Tensor) -> Tensor:
        return run(layer, block, states, *args, **kwargs)

    return checkpoint(forward, hidden_states, use_reentrant=False)


def _selective(layer: nn.Module, block: Block | None, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    def forward(states: Tensor) -> Tensor:
        return run_layer(layer, block, states, *args, **kwargs)

    return checkpoint(forward, hidden_states, use_reentrant=False, context_fn=_keep_narrow)


def _keep_narrow() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        inner, width = args[-1].shape
        return CheckpointPolicy.MUST_SAVE if width <= WIDENS * inner else CheckpointPolicy.PREFER_RECOMPUTE
    if "attn" in op.name() or "attention" in op.name():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
