"""Causal attention within each sequence of a packed row, never across, for every model on transformers' interface.

On CUDA in half precision it is torch's variable-length flash attention; elsewhere each sequence is attended on its own
by `scaled_dot_product_attention`, which needs no mask and no work on the pairs that a block mask would hide.
`attn_implementation="flash_attention_2"` takes the same offsets, if that package is installed.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from glm.models.chatglm1 import ChatGLMConfig

NAME = "packed"

# torch 2.11 takes fewer key heads than query heads without being told, later versions want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within the sequences that start at `cu_seq_lens_q` (int32, from 0 to the row's length).

    `query` [1, heads, length, head_dim], `key` and `value` with as many heads or a divisor of it (grouped-query
    attention). Returns [1, length, heads, head_dim]. Repeated offsets at the end stand for empty sequences.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    lengths = [length for length in cu_seq_lens_q.diff().tolist() if length]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _flash(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scaling: float) -> Tensor:
    query, key, value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    window = (-1, 0)  # causal
    return varlen_attn(
        query, key, value, offsets, offsets, longest, longest, scale=scaling, window_size=window, **_GROUPED
    )[None]


AttentionInterface.register(NAME, packed_attention)


def why_not_packed(model: PreTrainedModel) -> str | None:
    """The reason why `model` cannot be trained on packed rows; None where it can."""
    config = model.config
    if isinstance(config, ChatGLMConfig):
        return "ChatGLM-6B sees its prompt in both directions, which variable-length attention cannot express"
    if config._attn_implementation.endswith("_prefix"):
        return "a P-Tuning v2 prefix stands before every sequence"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} has an attention of its own"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{type(model).__name__} has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    return None


@contextmanager
def attention_of(model: PreTrainedModel, *, packed: bool) -> Iterator[None]:
    """Inside, `model` expects packed rows if `packed`; afterwards its attention is what it was."""
    if not packed:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
