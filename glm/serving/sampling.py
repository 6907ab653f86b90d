"""How a request wants its tokens chosen, and choosing them for the rows of a batch that each want it differently."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLDEST = 1e-5  # temperature


@dataclass(frozen=True)
class SamplingParams:
    """The wishes of one request."""

    max_new_tokens: int
    temperature: float = 1.0  # 0, and what is as good as 0: always the most probable token
    top_p: float = 1.0  # the smallest set of tokens with this probability (Holtzman et al. 2020)
    top_k: int = 0  # this many most probable tokens; 0: all
    seed: int | None = None  # the same seed gives the same answer, whoever else is in the batch
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    stop_token_ids: tuple[int, ...] = ()  # that end the answer, beside the model's own
    ignore_eos: bool = False  # the model's own end tokens do not end it
    logprobs: int | None = None  # of the chosen token and this many most probable ones; None: not wanted

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken. Logits divided by less would be infinite."""
        return self.temperature < COLDEST


class Chosen(NamedTuple):
    """A token and, where they were asked for, its log-probability and the most probable tokens with theirs."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, params: list[SamplingParams], draws: list[float]) -> list[Chosen]:
    """One token for each row of `logits` [n, vocabulary]; `draws` are n numbers from [0, 1).

    A row's token depends on its own logits, parameters and draw alone: the draw picks a place in the row's cumulative
    distribution. Log-probabilities are the model's own, before temperature and top_p.
    """
    tokens = logits.argmax(-1)
    if not all(row.greedy for row in params):
        sampled = _column([not row.greedy for row in params], logits)[:, 0]
        tokens = torch.where(sampled, _sample(logits.float(), params, draws), tokens)
    chosen = [Chosen(token) for token in tokens.tolist()]
    wanted = [index for index, row in enumerate(params) if row.logprobs is not None]
    if not wanted:
        return chosen
    logprobs = logits[wanted].float().log_softmax(-1)
    of_chosen = logprobs.gather(-1, tokens[wanted][:, None])[:, 0].tolist()
    most = max(params[index].logprobs or 0 for index in wanted)
    values, ids = (part.tolist() for part in logprobs.topk(most))
    for at, index in enumerate(wanted):
        few = slice(params[index].logprobs)
        alternatives = tuple(zip(ids[at][few], values[at][few], strict=True))
        chosen[index] = Chosen(chosen[index].token, of_chosen[at], alternatives)
    return chosen


def _sample(logits: Tensor, params: list[SamplingParams], draws: list[float]) -> Tensor:
    """Tokens [n] by inverse transform sampling; greedy rows get any."""
    temperature = _column([1.0 if row.greedy else row.temperature for row in params], logits)
    probabilities = (logits / temperature).softmax(-1)
    if any(row.top_p < 1 or row.top_k > 0 for row in params):
        top_p = _column([row.top_p for row in params], logits)
        top_k = _column([row.top_k or logits.shape[-1] for row in params], logits).clamp(max=logits.shape[-1])
        falling = _sorted(probabilities)
        kept = torch.minimum((falling.cumsum(-1) - falling < top_p).sum(-1, keepdim=True), top_k)
        kept = kept.clamp(min=1)  # a top_p that is 0 in float32 keeps the most probable token all the same
        probabilities = probabilities * (probabilities >= falling.gather(-1, kept - 1))
    total = probabilities.cumsum(-1)
    place = torch.searchsorted(total, _column(draws, logits) * total[:, -1:], right=True)[:, 0]
    # Rounding may put the target at the very sum: the last token with a probability is then the right one.
    return torch.minimum(place, (probabilities > 0).int().cumsum(-1).argmax(-1))


def _sorted(values: Tensor) -> Tensor:
    """Rows in falling order."""
    if values.device.type == "cpu":  # numpy sorts a vocabulary in a hundredth of torch's time
        return torch.from_numpy(np.sort(values.numpy())[:, ::-1].copy())
    return values.sort(descending=True).values


def _column(values: list[float] | list[int] | list[bool], like: Tensor) -> Tensor:
    """[n, 1] on the device of `like`."""
    return torch.tensor(values, device=like.device)[:, None]
