"""Log-probabilities and entropies at the answers' tokens, without a [tokens, vocabulary] tensor."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # float32 logits held at a time: 64 MiB


def token_logprobs(
    hidden: Tensor, head: nn.Module, tokens: Tensor, temperature: float, *, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token [m] after the hidden states [m, hidden], and the distributions' entropies.

    The logits are made a few at a time, and once more for the gradient, so that [m, vocabulary] never exists. Entropies
    carry a gradient only if asked to.
    """

    def some(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float() / temperature
        normalizer = logits.logsumexp(-1)
        chosen = logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropy = normalizer - ((logits - normalizer[:, None]).exp() * logits).sum(-1)
        return chosen, entropy

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(tokens) <= size:
        return some(hidden, tokens)
    pairs = zip(hidden.split(size), tokens.split(size), strict=True)
    parts = [checkpoint(some, states, ids, use_reentrant=False) for states, ids in pairs]
    chosen, entropies = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(entropies)
