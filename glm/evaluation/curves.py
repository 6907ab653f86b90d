"""Pictures of training curves: the raw line, and the same smoothed."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3  # panels side by side


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average whose weight grows with the number of points, as ChatGLM-Efficient-Tuning draws it.

    s_0 = x_0 and s_i = w s_{i-1} + (1 - w) x_i, with w = 1.8 (sigmoid(0.05 n) - 0.5) for n points: 0.02 for one point,
    0.76 for fifty, at most 0.9.
    """
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed: list[float] = []
    for value in values:
        smoothed.append(weight * smoothed[-1] + (1 - weight) * value if smoothed else value)
    return smoothed


def draw_curves(points: Mapping[int, Mapping[str, float]], title: str) -> "Figure":
    """One panel a curve.

    `points` maps a step to what was measured there; a curve may be absent at some steps. Losses come first.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    names = sorted({name for values in points.values() for name in values}, key=lambda name: ("loss" not in name, name))
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(4 * min(COLUMNS, len(names)), 3 * rows), dpi=100, layout="constrained")
    figure.suptitle(title)
    for position, name in enumerate(names, start=1):
        steps = sorted(step for step, values in points.items() if name in values)
        curve = [points[step][name] for step in steps]
        panel = figure.add_subplot(rows, min(COLUMNS, len(names)), position, title=name, xlabel="step")
        (line,) = panel.plot(steps, curve, alpha=0.4, label="original", marker="." if len(curve) == 1 else "")
        panel.plot(steps, smooth(curve), color=line.get_color(), label="smoothed")
        if position == 1:
            panel.legend()
    return figure


def draw_together(curves: Mapping[str, Mapping[int, float]], title: str) -> "Figure":
    """One panel with the same curve of several runs, by their names: {run: {step: value}}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    panel = figure.add_subplot(title=title, xlabel="step")
    for name, values in curves.items():
        steps = sorted(values)
        (line,) = panel.plot(steps, [values[step] for step in steps], alpha=0.25)
        panel.plot(steps, smooth([values[step] for step in steps]), color=line.get_color(), label=name)
    if curves:
        panel.legend()
    return figure
