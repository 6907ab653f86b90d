"""RRHF: rank responses to align with human feedback (Yuan et al. 2023), on the ranked answers of the reward data.

With p_i the mean log-probability of a token of answer i (eq. 2), a ranking costs the sum over its pairs of
max(0, p_worse - p_better) (eq. 3), plus the cross entropy of the best answer (eq. 4). The latter is the mean over
tokens here and not the sum, so that both have a scale that does not grow with the answer; `rrhf_weight` multiplies the
former. There is no reference model and no KL term.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glm.config import Rrhf
from glm.training.actors import Actors
from glm.training.answer_logprobs import Ranking, answer_logprobs, ranking_size, rows_of
from glm.training.distributed import summed_numbers
from glm.training.policy_loop import run


def train(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    dev_prompts: list[list[int]],
    params: Rrhf,
    *,
    seed: int,
    **options: Any,
) -> dict[str, float]:
    """Train the policy adapter in place on `rankings`; see `policy_loop.run` for the rest and the options.

    Curves: `loss`, its parts `rank_loss` and `sft_loss`, and `accuracy`, the share of pairs in the right order by p.
    """
    if not params.packing:
        actors.pad_rows()
    share_prompt = params.share_prompt
    size = ranking_size(actors, share_prompt=share_prompt)

    def gradients(chosen: list[int]) -> dict[str, float]:
        batch = [rankings[index] for index in chosen]
        sums: dict[str, float] = {}
        for row in rows_of(batch, size, params.tokens_per_forward):
            logprobs, lengths = answer_logprobs(actors, "policy", row, share_prompt=share_prompt)
            loss = torch.zeros((), device=logprobs.device)
            for ranking in (logprobs / lengths).split([len(ranking["sequences"]) for ranking in row]):
                rank_loss, sft_loss, accuracy = rrhf_terms(ranking)
                loss = loss + (params.rrhf_weight * rank_loss + sft_loss) / len(batch)
                for name, value in (("rank_loss", rank_loss), ("sft_loss", sft_loss), ("accuracy", accuracy)):
                    sums[name] = sums.get(name, 0.0) + value.item() / len(batch)
            loss.backward()
            sums["loss"] = sums.get("loss", 0.0) + loss.item()
        return summed_numbers(sums, actors.model.device)

    return run(actors, tokenizer, dev_prompts, params, len(rankings), gradients, seed=seed, **options)


def rrhf_terms(means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranking loss, best answer's loss and share of pairs in order, by the mean log-probabilities p, best first."""
    better, worse = torch.triu_indices(len(means), len(means), offset=1)
    margins = means[better] - means[worse]
    return (-margins).clamp(min=0).sum(), -means[0], (margins > 0).float().mean()
