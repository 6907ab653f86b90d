"""The loss of one ranking's scores [k], best answer first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glm.config import Reward


def ranking_loss(scores: Tensor, params: Reward) -> Tensor:
    """By `params.loss_type`, plus `center_rewards_coefficient` times the pairs' mean (r_better + r_worse)².

    pairwise        mean over pairs of -log sigmoid(r_better - r_worse - margin) (Ouyang et al. 2022, eq. 1; the margin
                    as in Touvron et al. 2023, eq. 2, but one for all), by a logsigmoid that does not underflow
    plackett_luce   mean over ranks of -log(exp r_rank / Σ exp r of this and all worse) (Plackett 1975; ListMLE, Xia et
                    al. 2008); for two answers it is the pairwise loss

    Scores are only determined up to a constant; the centring term (Eisenstein et al. 2023) holds them around 0.
    """
    better, worse = torch.triu_indices(len(scores), len(scores), offset=1)
    if params.loss_type == "pairwise":
        loss = -F.logsigmoid(scores[better] - scores[worse] - params.margin).mean()
    else:
        rest = scores.flip(0).logcumsumexp(0).flip(0)
        loss = (rest - scores)[:-1].mean()
    if params.center_rewards_coefficient:
        loss = loss + params.center_rewards_coefficient * (scores[better] + scores[worse]).square().mean()
    return loss
