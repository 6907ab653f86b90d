"""The reward model's report against cases worked out by hand."""

import math

import numpy as np
import pytest

from glm.evaluation import reward_report


def test_wilson_interval() -> None:
    # 8 of 10: the textbook case
    low, high = reward_report.wilson_interval(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    low, high = reward_report.wilson_interval(1.0, 20)
    assert 0.8 < low < 1 and high == pytest.approx(1)


def test_margins_and_lengths_of_rankings() -> None:
    # two pairs and a ranking of three: margins 2, -1 and 1, 3, 2
    scores = np.array([3.0, 1.0, 0.0, 1.0, 4.0, 3.0, 1.0])
    lengths = [10, 5, 3, 9, 8, 6, 2]
    found = reward_report.report(scores, [2, 2, 3], lengths)
    assert found["margin_p50"] == 2
    assert found["longer_preferred"] == 1  # every longer answer has the higher score
    assert found["longer_better"] == pytest.approx(4 / 5)
    assert found["length_correlation"] > 0.8
    low, high = reward_report.wilson_interval(4 / 5, 3)
    assert (found["accuracy_low"], found["accuracy_high"]) == (pytest.approx(low), pytest.approx(high))


def test_scores_that_ignore_length_do_not_correlate_with_it() -> None:
    draw = np.random.default_rng(0)
    scores, lengths = draw.normal(size=2000), draw.integers(5, 50, size=2000).tolist()
    found = reward_report.report(scores, [2] * 1000, lengths)
    assert abs(found["length_correlation"]) < 0.08
    assert found["longer_preferred"] == pytest.approx(0.5, abs=0.06)


def test_calibration() -> None:
    sure = math.log(9)  # sigmoid 0.9
    right, wrong = [sure] * 90, [-sure] * 10
    (bin,) = reward_report.reliability(np.array(right + wrong))
    assert bin == (pytest.approx(0.9), pytest.approx(0.9), pytest.approx(1))
    scores = np.array([value for margin in right + wrong for value in (margin, 0.0)])
    assert reward_report.report(scores, [2] * 100, [1] * 200)["calibration_error"] == pytest.approx(0)
    always = np.array([value for _ in range(100) for value in (sure, 0.0)])
    assert reward_report.report(always, [2] * 100, [1] * 200)["calibration_error"] == pytest.approx(0.1)


def test_equal_lengths_say_nothing() -> None:
    found = reward_report.report(np.array([2.0, 1.0, 1.5, 0.0]), [2, 2], [4, 4, 4, 4])
    assert found["length_correlation"] == 0 and found["longer_preferred"] == 0.5


def test_the_figure_has_its_panels() -> None:
    figure = reward_report.draw(np.array([2.0, 1.0, 0.0, 1.0]), [2, 2], [4, 3, 2, 1], "test")
    assert [panel.get_title() for panel in figure.axes] == ["margin", "calibration", "length"]
