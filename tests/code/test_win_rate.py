"""Win rate and gain by hand, and that the intervals hold what they should."""

import numpy as np
import pytest

from glm.evaluation.win_rate import mean_gain, win_rate


def test_win_rate_by_hand() -> None:
    # two wins, a loss, a tie
    found = win_rate([1.0, 2.0, 0.0, 3.0], [0.0, 1.0, 1.0, 3.0])
    assert found["win_rate"] == 0.625
    # Wilson, n = 4: (0.625 + 3.8416/8 ± 1.96 √(0.625·0.375/4 + 3.8416/64)) / (1 + 3.8416/4)
    assert found["win_rate_low"] == pytest.approx(0.2194, abs=1e-3)
    assert found["win_rate_high"] == pytest.approx(0.9081, abs=1e-3)


def test_the_gain_s_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        theirs = draw.normal(size=100)
        found = mean_gain(theirs + draw.normal(0.3, 1.0, 100), theirs)
        covered += found["gain_low"] <= 0.3 <= found["gain_high"]
    assert 180 <= covered <= 199


def test_lists_must_pair() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        win_rate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="0 and 0"):
        mean_gain([], [])
