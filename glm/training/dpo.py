"""Direct preference optimisation (Rafailov et al. 2023) on ranked answers, packed, against precomputed references.

A pair's loss is eq. 7, -log σ(β h) with h = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l); with `label_smoothing` ε it
is -(1 - ε) log σ(β h) - ε log σ(-β h) (Mitchell 2023, "cDPO"); `loss_type: ipo` is (h - 1/(2β))² (Azar et al. 2023,
eq. 17). Of a ranking of more than two answers, all pairs count alike. The forward passes of the reference are made
once, before the first step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glm.config import Dpo
from glm.training.actors import Actors
from glm.training.answer_logprobs import Ranking, answer_logprobs, ranking_size, reference_logprobs, rows_of
from glm.training.distributed import summed_numbers
from glm.training.policy_loop import batch_at, run


def train(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    dev_prompts: list[list[int]],
    params: Dpo,
    *,
    seed: int,
    **options: Any,
) -> dict[str, float]:
    """Train the policy adapter in place on `rankings`; see `policy_loop.run` for the rest and the options.

    Curves: `loss`, `accuracy` (share of pairs whose implicit rewards β log π/π_ref are in the right order), `margin`,
    and the mean implicit reward of the best and the worst answers (`chosen`, `rejected`).
    """
    if not params.packing:
        actors.pad_rows()
    share_prompt = params.share_prompt
    size = ranking_size(actors, share_prompt=share_prompt)
    needed = indices_needed(len(rankings), params, seed)
    used = [rankings[index] for index in needed]
    references = reference_logprobs(actors, used, params.tokens_per_forward, share_prompt=share_prompt)
    known = {
        index: {**ranking, "reference": values} for index, ranking, values in zip(needed, used, references, strict=True)
    }

    def gradients(chosen: list[int]) -> dict[str, float]:
        batch = [known[index] for index in chosen]
        sums: dict[str, float] = {}
        for row in rows_of(batch, size, params.tokens_per_forward):
            logprobs, _ = answer_logprobs(actors, "policy", row, share_prompt=share_prompt)
            reference = torch.tensor([value for ranking in row for value in ranking["reference"]]).to(logprobs)
            rewards = params.beta * (logprobs - reference)
            loss = torch.zeros((), device=rewards.device)
            for ranking in rewards.split([len(ranking["sequences"]) for ranking in row]):
                margins = pair_margins(ranking)
                loss = loss + dpo_loss(margins, params) / len(batch)
                numbers = {
                    "accuracy": (margins > 0).float().mean(),
                    "margin": margins.mean(),
                    "chosen": ranking[0],
                    "rejected": ranking[-1],
                }
                for name, value in numbers.items():
                    sums[name] = sums.get(name, 0.0) + value.item() / len(batch)
            loss.backward()
            sums["loss"] = sums.get("loss", 0.0) + loss.item()
        return summed_numbers(sums, actors.model.device)

    return run(actors, tokenizer, dev_prompts, params, len(rankings), gradients, seed=seed, **options)


def indices_needed(rows: int, params: Dpo, seed: int) -> list[int]:
    """Which of the rows the training sees: a part of them where it ends within the first epoch.

    Raises:
        InputError: fewer rows than one batch.
    """
    if params.max_steps * params.batch_size >= rows >= params.batch_size:
        return list(range(rows))
    steps = range(1, params.max_steps + 1)
    return sorted(index for step in steps for index in batch_at(step, rows, params.batch_size, seed))


def dpo_loss(margins: Tensor, params: Dpo) -> Tensor:
    """Mean loss of pairs by their margins β h."""
    if params.loss_type == "ipo":
        return ((margins / params.beta - 1 / (2 * params.beta)) ** 2).mean()
    smoothing = params.label_smoothing
    return -((1 - smoothing) * F.logsigmoid(margins) + smoothing * F.logsigmoid(-margins)).mean()


def pair_margins(rewards: Tensor) -> Tensor:
    """Differences better - worse of all pairs of one ranking, best first."""
    better, worse = torch.triu_indices(len(rewards), len(rewards), offset=1)
    return rewards[better] - rewards[worse]
