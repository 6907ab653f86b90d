"""Next-token loss where labels are, and nowhere else: neither computed nor kept for prompts and padding."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glm.data.encode import IGNORED
from glm.training.product import on_cpu, product

CHUNK_IN_CACHE = 2**18  # logits at a time on a CPU: 1 MB
CHUNK_LOGITS = 2**25  # logits that live at a time: 134 MB in float32, 516 tokens of ChatGLM2's vocabulary


def label_positions(labels: Tensor) -> dict[str, Tensor]:
    """`positions` and `targets`, both [n], of `labels` [rows, length]: where in the flattened rows which token comes.

    The first label of a row is predicted by nothing; rows that hold several sequences must ignore each one's first.
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return {"positions": rows * labels.shape[1] + columns, "targets": labels[rows, columns + 1]}


def cross_entropy_sum(
    hidden: Tensor, head: nn.Module, targets: Tensor, vocabulary: int, *, compiled: bool = False, fused: bool = False
) -> Tensor:
    """Sum over tokens of -log softmax(head(hidden))[target], in float32.

    `hidden` [n, hidden size] are the last hidden states at the positions to predict from, `targets` [n] token ids. No
    more than CHUNK_LOGITS logits exist at a time. Under a frozen head the gradient of `hidden` is made on the way, so
    that nothing is computed twice; under a trained one the backward pass computes the logits again. What fits one
    chunk is simply kept. `compiled`: under a frozen head, what comes after its product is. `fused`: as fused layers,
    on a CPU in float32 with cheaper products and nothing kept of the logits.
    """
    chunk = max(1, CHUNK_LOGITS // vocabulary)
    frozen = hidden.requires_grad and not any(parameter.requires_grad for parameter in head.parameters())
    if fused and frozen and type(head) is nn.Linear and head.bias is None and on_cpu(head.weight):
        return _FrozenWeight.apply(hidden, head.weight, targets, max(1, CHUNK_IN_CACHE // vocabulary))
    if len(targets) <= chunk:
        return _chunk(hidden, head, targets)
    if frozen:
        return _FrozenHead.apply(hidden, head, targets, chunk, _compiled_loss if compiled else _loss)
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_chunk, states, head, wanted, use_reentrant=False, preserve_rng_state=False)
    return total


def _chunk(states: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return _loss(head(states), targets)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


_compiled_loss = torch.compile(_loss, dynamic=True)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int, loss_of: Callable[..., Tensor]
    ) -> Tensor:
        gradients, total = [], hidden.new_zeros((), dtype=torch.float32)
        for states, wanted in zip(hidden.detach().split(chunk), targets.split(chunk), strict=True):
            with torch.enable_grad():
                loss = loss_of(head(states.requires_grad_()), wanted)
            gradients += torch.autograd.grad(loss, states)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradient_of_sum: Tensor) -> Any:
        return ctx.saved_tensors[0] * gradient_of_sum[0], None, None, None, None


class _FrozenWeight(torch.autograd.Function):
    """`_FrozenHead` of a plain weight, in chunks that stay in a CPU's cache, softmax in the logits' place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        gradients, total = [], hidden.new_zeros(())
        for states, wanted in zip(hidden.split(chunk), targets[:, None].split(chunk), strict=True):
            logits = product(states, weight)
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (normalizer - logits.gather(-1, wanted)).sum()
            logits.sub_(normalizer).exp_()
            logits.scatter_add_(-1, wanted, logits.new_full(wanted.shape, -1.0))
            gradients.append(product(logits, weight.t()))
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradient_of_sum: Tensor) -> Any:
        return ctx.saved_tensors[0] * gradient_of_sum[0], None, None, None
