"""The terms of PPO as functions of tensors, with the equations they come from.

Shapes: n responses, a tokens of the longest one; `mask` [n, a] is 1.0 on real tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch


def kl_penalty(
    logprobs: torch.Tensor, reference: torch.Tensor, estimator: Literal["k1", "k2", "k3"] = "k1"
) -> torch.Tensor:
    """An estimate of the KL divergence to the reference at each token, of the shape of both.

    With r = π_ref / π: k1 = -log r (unbiased), k2 = ½ (log r)² (biased, never negative), k3 = r - 1 - log r (unbiased
    and never negative). Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return log_ratio.exp() - 1 - log_ratio


def token_rewards(scores: torch.Tensor, penalty: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Reward of each token [n, a]: -kl_coef times the KL `penalty` [n, a], plus the score [n] on the last one.

    Ziegler et al. 2019, eq. 2; the per-token form of Ouyang et al. 2022.
    """
    rewards = -kl_coef * penalty * mask
    last = mask.sum(-1).long() - 1
    rewards[torch.arange(len(last)), last] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and the returns that the value should predict, each [n, a].

    Schulman et al. 2016, eq. 16: A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} - V_t, and V = 0 after the last token.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] * mask[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def clipped_policy_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-E[min(ratio A, clip(ratio, 1±ε) A)] over tokens (Schulman et al. 2017, eq. 7), and the share clipped."""
    ratio = (logprobs - old).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -masked_mean(torch.minimum(plain, clipped), mask), masked_mean((clipped < plain).float(), mask)


def clipped_value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """½ E[max((V - R)², (clip(V, V_old ± ε) - R)²)] over tokens (the value loss of OpenAI's PPO)."""
    near = old + (values - old).clamp(-cliprange, cliprange)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """The next coefficient, β (1 + clip(KL/target - 1, ±0.2) · responses / horizon): Ziegler et al. 2019, §2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)


def k3(logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum of the k3 estimates over each response [n] in nats."""
    return (kl_penalty(logprobs, reference, "k3") * mask).sum(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens whose mask is 1."""
    return (values * mask).sum() / mask.sum()


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Scale to variance 1, and shift to mean 0 unless told not to, over the tokens whose mask is 1."""
    mean = masked_mean(values, mask)
    centred = values - mean
    white = centred * (masked_mean(centred**2, mask) + 1e-8).rsqrt()
    return (white if shift_mean else white + mean) * mask


@dataclass
class ScoreScale:
    """Running mean and spread of all scores seen so far (Chan et al. 1979), by which scores are normalised."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def normalised(self, scores: torch.Tensor) -> torch.Tensor:
        """Take the scores [n] in, and return them less the mean, divided by the standard deviation.

        In float64: of equal scores, float32 would make a spread of rounding, and divide by it.
        """
        exact = scores.double()
        count, mean = len(scores), exact.mean().item()
        distance, total = mean - self.mean, self.count + count
        self.squares += ((exact - mean) ** 2).sum().item() + distance**2 * self.count * count / total
        self.mean += distance * count / total
        self.count = total
        return ((exact - self.mean) / ((self.squares / total) ** 0.5 + 1e-8)).to(scores.dtype)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over tokens: 1 is a perfect value function, 0 a constant one.

    0 too where all returns are equal, so that there is nothing to explain.
    """
    chosen = mask.bool()
    spread = returns[chosen].var(correction=0)
    left = (returns - values)[chosen].var(correction=0)
    return (1 - left / spread).item() if spread > 1e-12 else 0.0
