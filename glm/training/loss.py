"""Next-token loss where labels are, and nowhere else: neither computed nor kept for prompts and padding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glm.data.encode import IGNORED

CHUNK_LOGITS = 2**25  # logits that live at a time: 134 MB in float32, 516 tokens of ChatGLM2's vocabulary


def label_positions(labels: Tensor) -> dict[str, Tensor]:
    """`positions` and `targets`, both [n], of `labels` [rows, length]: where in the flattened rows which token comes.

    The first label of a row is predicted by nothing; rows that hold several sequences must ignore each one's first.
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return {"positions": rows * labels.shape[1] + columns, "targets": labels[rows, columns + 1]}


def cross_entropy_sum(hidden: Tensor, head: nn.Module, targets: Tensor, vocabulary: int) -> Tensor:
    """Sum over tokens of -log softmax(head(hidden))[target], in float32.

    `hidden` [n, hidden size] are the last hidden states at the positions to predict from, `targets` [n] token ids. No
    more than CHUNK_LOGITS logits exist at a time, in the backward pass either, where they are computed again; fewer
    are simply kept.
    """
    chunk = max(1, CHUNK_LOGITS // vocabulary)
    if len(targets) <= chunk:
        return _chunk(hidden, head, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_chunk, states, head, wanted, use_reentrant=False, preserve_rng_state=False)
    return total


def _chunk(states: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="sum")
