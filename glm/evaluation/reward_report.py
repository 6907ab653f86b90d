"""How far a reward model may be trusted: accuracy with its interval, calibration, and what it makes of length.

All of it is about held-out rankings: `scores` [answers] in the order best answer first, ranking after ranking, `sizes`
the number of answers of each ranking, `lengths` the tokens of each answer.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 10


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` independent trials (Wilson 1927); it never leaves [0, 1]."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def report(scores: np.ndarray, sizes: list[int], lengths: list[int]) -> dict[str, float]:
    """Numbers for the metrics file.

    `accuracy_low`, `accuracy_high`: 95 % interval of the share of pairs in the right order; the pairs of one ranking
    are not independent, so that a ranking counts as one trial. `margin_p10`, `margin_p50`, `margin_p90`: a tenth, half,
    nine tenths of the margins (better less worse) are below. `calibration_error`: mean distance between how sure the
    model is of a pair, sigmoid(|margin|), and how often it is right (Guo et al. 2017, eq. 3). `length_correlation`: of
    score and length (Spearman) among answers to the same prompt. `longer_preferred`: share of pairs of unequal length
    whose longer answer scores higher; `longer_better`: in which it is the better one.
    """
    margins, longer = _pairs(scores, sizes, lengths)
    low, high = wilson_interval(float((margins > 0).mean()), len(sizes))
    tenth, median, last_tenth = np.quantile(margins, [0.1, 0.5, 0.9])
    unequal = longer != 0
    return {
        "accuracy_low": low,
        "accuracy_high": high,
        "margin_p10": float(tenth),
        "margin_p50": float(median),
        "margin_p90": float(last_tenth),
        "calibration_error": sum(weight * abs(sure - right) for sure, right, weight in reliability(margins)),
        "length_correlation": _spearman(_centred(scores, sizes), _centred(np.asarray(lengths, float), sizes)),
        "longer_preferred": _share((margins > 0) == (longer > 0), unequal),
        "longer_better": _share(longer > 0, unequal),
    }


def reliability(margins: np.ndarray) -> list[tuple[float, float, float]]:
    """(mean confidence, share right, share of the pairs) of each filled tenth of the confidences 0.5 … 1."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    chosen = [place == number for number in np.unique(place)]
    return [(float(confidence[bin].mean()), float((margins[bin] > 0).mean()), float(bin.mean())) for bin in chosen]


def draw(scores: np.ndarray, sizes: list[int], lengths: list[int], title: str) -> "Figure":
    """Three panels: the margins' histogram, confidence against accuracy, score against length within a prompt."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    margins, _ = _pairs(scores, sizes, lengths)
    figure = Figure(figsize=(12, 3.5), dpi=100, layout="constrained")
    figure.suptitle(title)
    histogram, calibration, length = figure.subplots(1, 3)
    histogram.set(title="margin", xlabel="score of the better less that of the worse answer", ylabel="pairs")
    histogram.hist(margins, bins=40)
    histogram.axvline(0, color="black", linewidth=1)
    calibration.set(title="calibration", xlabel="sigmoid(|margin|)", ylabel="share in the right order")
    sure, right, _ = zip(*reliability(margins), strict=True)
    calibration.plot([0.5, 1], [0.5, 1], color="grey", linestyle="dashed")
    calibration.plot(sure, right, marker="o")
    length.set(title="length", xlabel="tokens more than the prompt's mean answer", ylabel="score above it")
    length.scatter(_centred(np.asarray(lengths, float), sizes), _centred(scores, sizes), s=4, alpha=0.5)
    return figure


def draw_rewards(rewards: list[float], title: str) -> "Figure":
    """The histogram of answers' rewards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel="reward", ylabel="answers")
    axes.hist(rewards, bins=30)
    axes.axvline(sum(rewards) / len(rewards), color="black", linewidth=1)
    return figure


def _split(values: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1])


def _margins(ranking: np.ndarray) -> np.ndarray:
    better, worse = np.triu_indices(len(ranking), 1)
    return ranking[better] - ranking[worse]


def _pairs(scores: np.ndarray, sizes: list[int], lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of all pairs: score of the better answer less that of the worse, and the same of their lengths."""
    margins = [_margins(ranking) for ranking in _split(scores, sizes)]
    longer = [_margins(ranking) for ranking in _split(np.asarray(lengths, float), sizes)]
    return np.concatenate(margins), np.concatenate(longer)


def _centred(values: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.concatenate([ranking - ranking.mean() for ranking in _split(values, sizes)])


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of the ranks, equal values sharing theirs; 0 where one of both never changes."""
    ranks = [np.unique(values, return_inverse=True, return_counts=True)[1:] for values in (one, other)]
    mean_ranks = [(np.cumsum(counts) - (counts - 1) / 2)[place] for place, counts in ranks]
    if any(values.std() == 0 for values in mean_ranks):
        return 0.0
    return float(np.corrcoef(mean_ranks[0], mean_ranks[1])[0, 1])


def _share(yes: np.ndarray, among: np.ndarray) -> float:
    return float(yes[among].mean()) if among.any() else 0.5
