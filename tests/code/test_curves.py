import pytest

from glm.evaluation.curves import draw_curves, smooth


def test_smoothing_is_the_reference_s() -> None:
    assert smooth([4, 3, 2, 1]) == pytest.approx([4.0, 3.089701, 2.097747, 1.098469], abs=1e-6)
    assert smooth([]) == []


def test_one_panel_a_curve_with_its_own_steps_and_losses_first() -> None:
    figure = draw_curves({1: {"accuracy": 0.5, "loss": 2.0}, 2: {"loss": 1.0}}, "reward")
    assert [panel.get_title() for panel in figure.axes] == ["loss", "accuracy"]
    raw, smoothed = figure.axes[0].lines
    assert raw.get_xydata().tolist() == [[1, 2.0], [2, 1.0]]
    assert smoothed.get_ydata().tolist() == smooth([2.0, 1.0])
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[1, 0.5]]
