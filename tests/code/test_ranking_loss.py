"""The reward model's losses by hand."""

import math
from itertools import permutations

import pytest
import torch

from glm.config import Reward
from glm.training.ranking_loss import ranking_loss
from glm.training.reward import pairwise_loss


def loss(scores: list[float], **params: object) -> float:
    return ranking_loss(torch.tensor(scores), Reward(**params)).item()


def test_pairs_by_hand() -> None:
    # differences 1, 3, 2; -log sigmoid: 0.313262, 0.048587, 0.126928
    assert loss([2.0, 1.0, -1.0]) == pytest.approx((0.313262 + 0.048587 + 0.126928) / 3, abs=1e-5)
    assert loss([2.0, 1.0], margin=1.0) == pytest.approx(math.log(2), abs=1e-6)
    assert loss([-200.0, 200.0]) == pytest.approx(400.0)  # no underflow
    scores = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert ranking_loss(scores, Reward()).item() == pytest.approx(pairwise_loss(scores, [5]).item(), abs=1e-6)


def test_plackett_luce_by_hand() -> None:
    # the best of e², e, e⁻¹, then the better of e, e⁻¹
    first = math.log((math.e**2 + math.e + 1 / math.e) / math.e**2)
    second = math.log((math.e + 1 / math.e) / math.e)
    found = loss([2.0, 1.0, -1.0], loss_type="plackett_luce")
    assert found == pytest.approx((first + second) / 2, abs=1e-6)
    assert loss([0.3, -1.2], loss_type="plackett_luce") == pytest.approx(loss([0.3, -1.2]), abs=1e-6)


def test_centring_is_zero_for_centred_pairs() -> None:
    assert loss([1.0, -1.0], center_rewards_coefficient=0.1) == pytest.approx(loss([1.0, -1.0]))
    assert loss([3.0, 1.0], center_rewards_coefficient=0.1) == pytest.approx(loss([3.0, 1.0]) + 1.6)


def test_a_margin_belongs_to_pairs() -> None:
    with pytest.raises(ValueError, match=r"margin 1\.0 is of loss_type pairwise"):
        Reward(loss_type="plackett_luce", margin=1.0)


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.1])
    params = Reward(loss_type="plackett_luce")
    orders = [scores[list(order)] for order in permutations(range(4))]
    assert sum(math.exp(-3 * ranking_loss(order, params).item()) for order in orders) == pytest.approx(1, abs=1e-5)
