"""Attention within each sequence of a packed row, never across, for every model on transformers' interface.

`IMPLEMENTATIONS` names the ways. "varlen", the default, is this module's: torch's variable-length flash attention on
CUDA in half precision; elsewhere each sequence is attended on its own by `scaled_dot_product_attention`, which needs no
mask and no work on the pairs that a block mask would hide. The others are transformers' own and take the same rows:
"flex_attention" gets a block mask that transformers makes from the positions, "flash_attention_2" the offsets. On a CPU
torch's flex attention has no backward pass; there the same mask goes to "sdpa", written out.

A prefix LM (ChatGLM-6B) reads its prompt in both directions. It is attended twice, causally and then in both directions
within prompts, and each token takes the result that is its own: no mask of any size, and fixed shapes to compile.

"varlen" also takes rows in which the answers of a ranking share their prompt (`glm.training.packing`): an answer's
queries stand in the row once, but its keys are the prompt's and its own. So keys and values, and nothing else, are
copied to where they would be if each answer had the prompt to itself, and the same kernel attends from fewer queries to
as many keys. The models of this family have two heads of keys to 32 of queries, which makes the copies small.
"""

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from glm.errors import InputError
from glm.models.chatglm1 import ChatGLMConfig

VARLEN = "varlen"
IMPLEMENTATIONS = (VARLEN, "flex_attention", "flash_attention_2")

# torch 2.11 takes fewer key heads than query heads without being told, later versions want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    key_sources: Tensor | None = None,
    key_copies: Tensor | None = None,
    cu_seq_lens_prefix: Tensor | None = None,
    in_prefix: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within the sequences that start at `cu_seq_lens_q` (int32, from 0 to the row's length).

    `query` [1, heads, length, head_dim], `key` and `value` with as many heads or a divisor of it (grouped-query
    attention). Repeated offsets at the end stand for empty sequences. With `key_sources` [keys], the tokens whose keys
    and values stand side by side, sequences begin at `cu_seq_lens_k` there and may have more keys than queries, which
    are then their last tokens'; `key_copies` [copies, length] is where a token's went, -1 for nowhere. For a prefix LM,
    `cu_seq_lens_prefix` are the offsets of prompts and answers in turn, and `in_prefix` [1, length] says which tokens
    are a prompt's. Returns [1, length, heads, head_dim].
    """
    # under autocast on float32 weights (method full) the rotary embedding widens query and key, and value is as wanted
    query, key = query.to(value.dtype), key.to(value.dtype)
    fast = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    attend = _flash if fast else _one_by_one
    keys, values = key, value
    if key_sources is not None:
        keys, values = (_Copied.apply(states, key_sources, key_copies) for states in (key, value))
    offsets, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
    output = attend(query, keys, values, offsets, longest, scaling, causal=True)
    if in_prefix is not None:
        within, longest = (cu_seq_lens_prefix, cu_seq_lens_prefix), (max_length_q, max_length_q)
        both_ways = attend(query, key, value, within, longest, scaling, causal=False)
        output = torch.where(in_prefix[..., None, None], both_ways, output)
    return output, None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float,
    *,
    causal: bool,
) -> Tensor:
    query, key, value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    window = (-1, 0 if causal else -1)  # of fewer queries than keys, the last one sees all
    return varlen_attn(query, key, value, *offsets, *longest, scale=scaling, window_size=window, **_GROUPED)[None]


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float,
    *,
    causal: bool,
) -> Tensor:
    # a sequence without queries has no keys
    queries, keys = ([length for length in begins.diff().tolist() if length] for begins in offsets)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for q, k, v in zip(query.split(queries, dim=2), key.split(keys, dim=2), value.split(keys, dim=2), strict=True):
        mask = None
        if shared := k.shape[2] - q.shape[2]:  # is_causal would take the queries for those of the first keys
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(shared)
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scaling}
        outputs.append(F.scaled_dot_product_attention(q, k, v, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2)


class _Copied(torch.autograd.Function):
    """states[:, :, sources]; the gradient is gathered from `copies`, which takes no atomic additions and no order."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, sources: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return states.index_select(2, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        own, *others = ctx.saved_tensors[0]
        total = gradients[0].index_select(2, own)
        for other in others:
            found = gradients[0].index_select(2, other.clamp(min=0))
            total = total + torch.where((other >= 0)[:, None], found, 0)
        return total, None, None


AttentionInterface.register(VARLEN, varlen_attention)


def why_not_packed(model: PreTrainedModel, implementation: str = VARLEN) -> str | None:
    """The reason why `model` cannot be trained on packed rows with `implementation`; None where it can."""
    config = model.config
    if isinstance(config, ChatGLMConfig) and implementation != VARLEN:
        return f"ChatGLM-6B sees its prompt in both directions, which {implementation} is not told; {VARLEN} is"
    if config._attn_implementation.endswith("_prefix"):
        return "a P-Tuning v2 prefix stands before every sequence"
    if dropout := getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout {dropout} is not for packed rows"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} has an attention of its own"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{type(model).__name__} has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    return None


def packed_implementation(model: PreTrainedModel, wanted: str) -> str:
    """What transformers is told for `wanted`, "auto" or one of IMPLEMENTATIONS, on the device of `model`.

    Raises:
        InputError: flash_attention_2 without its package, or on a model that is not in half precision on a GPU.
    """
    if wanted == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            raise InputError("attn_implementation: flash_attention_2 needs the package flash-attn; varlen needs none")
        if model.device.type != "cuda" or model.dtype == torch.float32:
            raise InputError(
                "attn_implementation: flash_attention_2 needs a GPU and model.dtype bfloat16 or float16 "
                f"(found {model.device.type}, {str(model.dtype).removeprefix('torch.')}); varlen runs anywhere"
            )
    if wanted == "flex_attention" and model.device.type == "cpu":
        return "sdpa"
    return VARLEN if wanted == "auto" else wanted


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str | None) -> Iterator[None]:
    """Inside, `model` expects packed rows, if an `implementation` is named; afterwards its attention is what it was."""
    if implementation is None:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
