"""PPO's terms against cases worked out by hand."""

import math

import pytest
import torch

from glm.training import ppo_terms

ONES = torch.ones(1, 3)


def test_token_rewards_put_the_score_on_the_last_real_token() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -1.0, 0.0], [-1.0, -2.0, -3.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    penalty = ppo_terms.kl_penalty(logprobs, reference)
    rewards = ppo_terms.token_rewards(torch.tensor([5.0, -1.0]), penalty, mask, kl_coef=0.1)
    # row 1: -0.1 * 0.5, -0.1 * -1 + 5, padding; row 2: 0, -0.1 * 1, -0.1 * 2 - 1
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 5.1, 0.0], [0.0, -0.1, -1.2]]))


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.2, 0.4]])
    advantages, returns = ppo_terms.gae(rewards, values, ONES, gamma=0.9, lam=0.8)
    last = 1 - 0.4  # δ3
    middle = 0.9 * 0.4 - 0.2 + 0.72 * last  # δ2 + γλ A3
    first = 0.9 * 0.2 - 0.5 + 0.72 * middle
    torch.testing.assert_close(advantages, torch.tensor([[first, middle, last]]))
    torch.testing.assert_close(returns, advantages + values)


def test_gae_of_a_padded_row_is_that_of_the_row_alone() -> None:
    rewards, values = torch.randn(1, 3), torch.randn(1, 3)
    alone, _ = ppo_terms.gae(rewards, values, ONES, 0.99, 0.95)
    padded, returns = ppo_terms.gae(
        torch.cat([rewards, torch.full((1, 2), 9.0)], 1),
        torch.cat([values, torch.full((1, 2), 9.0)], 1),
        torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]),
        0.99,
        0.95,
    )
    torch.testing.assert_close(padded[:, :3], alone)
    assert (padded[:, 3:] == 0).all() and (returns[:, 3:] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_gae_is_the_sum_of_discounted_errors_for_answers_of_any_length(gamma: float, lam: float) -> None:
    """Eq. 16 as it stands, A_t = Σ (γλ)^l δ_{t+l}, of each answer by itself."""
    lengths = [1, 5, 2]
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 5, generator=draw), torch.randn(3, 5, generator=draw)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).float()
    wanted = torch.zeros(3, 5)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        errors = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            wanted[row, t] = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length))
    advantages, returns = ppo_terms.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, wanted)
    torch.testing.assert_close(returns, (wanted + values) * mask)


def test_with_lambda_and_gamma_one_the_return_is_the_sum_of_rewards_to_come() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.randn(1, 3)
    _, returns = ppo_terms.gae(rewards, values, ONES, 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))


def test_policy_loss_by_hand() -> None:
    # ratios 1.5, 0.5, 1.1 with advantages 2, -1, -3 and ε = 0.2:
    # min(3, 2.4) = 2.4 clipped; min(-0.5, -0.8) = -0.8 clipped; min(-3.3, -3.3)
    logprobs = torch.log(torch.tensor([[1.5, 0.5, 1.1]]))
    loss, clipped = ppo_terms.clipped_policy_loss(
        logprobs, torch.zeros(1, 3), torch.tensor([[2.0, -1.0, -3.0]]), ONES, 0.2
    )
    assert loss.item() == pytest.approx(-(2.4 - 0.8 - 3.3) / 3)
    assert clipped.item() == pytest.approx(2 / 3)


def test_policy_gradient_at_ratio_one_is_the_advantage() -> None:
    logprobs = torch.zeros(1, 3, requires_grad=True)
    advantages = torch.tensor([[2.0, -1.0, 0.5]])
    ppo_terms.clipped_policy_loss(logprobs, torch.zeros(1, 3), advantages, ONES, 0.2)[0].backward()
    torch.testing.assert_close(logprobs.grad, -advantages / 3)


def test_value_loss_by_hand() -> None:
    # value 2, moved from 0, is clipped to 0.2: (0.2 - 1)² = 0.64 < (2 - 1)² = 1
    # value 0.1 is not clipped: (0.1 - 1)² = 0.81
    loss = ppo_terms.clipped_value_loss(
        torch.tensor([[2.0, 0.1]]), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 0.2
    )
    assert loss.item() == pytest.approx(0.5 * (1 + 0.81) / 2)


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.1), (6.6, 0.1 * (1 + 0.1 * 32 / 100)), (60.0, 0.1 * 1.064), (0.0, 0.1 * 0.936)]
)
def test_kl_coefficient_follows_the_error_within_a_fifth(kl: float, expected: float) -> None:
    assert ppo_terms.adapted_kl_coef(0.1, kl, target=6.0, horizon=100, responses=32) == pytest.approx(expected)


def test_k3_is_never_negative_and_close_to_k1_for_near_distributions() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(20000, 5).log_softmax(-1)[:1], torch.randn(1, 5).log_softmax(-1)
    true_kl = (policy.exp() * (policy - reference)).sum().item()
    tokens = torch.multinomial(policy.exp()[0], 40000, replacement=True)
    chosen, other = policy[0][tokens][:, None], reference[0][tokens][:, None]
    estimates = ppo_terms.k3(chosen, other, torch.ones_like(chosen))
    assert (estimates >= 0).all()
    assert estimates.mean().item() == pytest.approx(true_kl, rel=0.05)


def test_whitening_looks_only_at_real_tokens() -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    white = ppo_terms.whiten(torch.tensor([[1.0, 2.0, 3.0, 4.0, 1000.0]]), mask)
    assert white[0, 4] == 0
    assert white.sum().item() == pytest.approx(0, abs=1e-6)
    assert (white**2).sum().item() / 4 == pytest.approx(1, abs=1e-6)


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    assert ppo_terms.explained_variance(returns, returns, ONES) == pytest.approx(1)
    assert ppo_terms.explained_variance(torch.full((1, 3), 7.0), returns, ONES) == pytest.approx(0)
    assert ppo_terms.explained_variance(returns, torch.full((1, 3), 2.0), ONES) == 0
    assert ppo_terms.explained_variance(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1)) == 0


def test_kl_estimators_by_hand() -> None:
    logprobs, reference = torch.tensor([-1.0]), torch.tensor([-1.5])  # log r = -0.5
    assert ppo_terms.kl_penalty(logprobs, reference, "k1").item() == pytest.approx(0.5)
    assert ppo_terms.kl_penalty(logprobs, reference, "k2").item() == pytest.approx(0.125)
    assert ppo_terms.kl_penalty(logprobs, reference, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)


def test_whitening_may_keep_the_mean() -> None:
    white = ppo_terms.whiten(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), shift_mean=False)
    torch.testing.assert_close(white, torch.tensor([[1.0, 3.0]]))  # mean 2, standard deviation 1


def test_running_normalisation_is_that_of_all_scores_together() -> None:
    torch.manual_seed(0)
    scores = torch.randn(60) * 3 + 5
    scale = ppo_terms.ScoreScale()
    for part in scores.split([10, 30, 20]):
        last = scale.normalised(part)
    assert scale.mean == pytest.approx(scores.mean().item(), rel=1e-5)
    torch.testing.assert_close(last, ((scores - scores.mean()) / scores.std(correction=0))[40:], rtol=1e-4, atol=1e-4)


def test_equal_scores_and_advantages_become_nothing() -> None:
    """As where every answer was cut, or a function always says the same: rounding must not pass for a difference."""
    scale = ppo_terms.ScoreScale()
    for count in (1, 33, 32):
        assert scale.normalised(torch.full((count,), 0.1)).abs().max() < 1e-6
    assert ppo_terms.whiten(torch.full((3, 7), 0.1), torch.ones(3, 7)).abs().max() < 1e-3
