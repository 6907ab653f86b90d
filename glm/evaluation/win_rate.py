"""Is one policy better than another? Answers to the same prompts, scored by the same judge, compared pair by pair."""

from collections.abc import Sequence

import numpy as np

from glm.evaluation.reward_report import wilson_interval

RESAMPLES = 2000


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """`win_rate`: share of the prompts whose answer of ours scores higher, an equal score counting half, with its 95 %
    interval `win_rate_low`, `win_rate_high` (Wilson 1927).

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    margins = _margins(ours, theirs)
    share = float((margins > 0).mean() + 0.5 * (margins == 0).mean())
    low, high = wilson_interval(share, len(margins))
    return {"win_rate": share, "win_rate_low": low, "win_rate_high": high}


def mean_gain(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> dict[str, float]:
    """`gain`: mean score of ours less that of theirs, with its 95 % interval `gain_low`, `gain_high`.

    The interval is that of the percentile bootstrap over prompts (Efron 1979).

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    margins = _margins(ours, theirs)
    drawn = np.random.default_rng(seed).integers(len(margins), size=(RESAMPLES, len(margins)))
    low, high = np.quantile(margins[drawn].mean(1), [0.025, 0.975])
    return {"gain": float(margins.mean()), "gain_low": float(low), "gain_high": float(high)}


def _margins(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    if not len(ours) or len(ours) != len(theirs):
        raise ValueError(f"need as many scores of both, at least one: {len(ours)} and {len(theirs)}")
    return np.asarray(ours, float) - np.asarray(theirs, float)
