"""The gate: may a challenger become the champion? Numbers in, a decision with every check's value and bound out.

Nothing here knows Prefect or MLflow. What is measured comes from `python -m tasks.judge` (reports/judge, both models on
the same held-out rows) and from the run's own metrics; the bounds are `promote` in params.yaml.

A comparison is made on the differences row by row, "challenger better than champion", with the percentile interval of
their bootstrapped mean (Efron and Tibshirani 1993, chapter 13): its low end must be above delta (`delta`, better beyond
chance), and not below -epsilon (`epsilon`, not worse beyond what is tolerated).
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm.config import MetricGate, Promote
from glm.errors import InputError
from glm.files import read_jsonl

LESS_IS_BETTER = ("nats_per_character",)
METRICS = tuple(Promote().metrics.model_dump())


@dataclass(frozen=True)
class Check:
    """One condition: what was looked at, the value found, what it had to be, and whether it was."""

    name: str
    value: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class Decision:
    """All checks; the challenger passes if each of them does."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def as_rows(self) -> list[dict[str, Any]]:
        """A row a check, for a table."""
        return [asdict(check) for check in self.checks]


@dataclass(frozen=True)
class Evidence:
    """What is known of a challenger, and of the champion on the same rows (None without one).

    `rows` maps a metric to its value in each row, in the same order for both. Numbers that were not measured are None.
    """

    challenger: Mapping[str, Sequence[float]]
    champion: Mapping[str, Sequence[float]] | None = None
    answers: Sequence[str] = ()
    reward_accuracy: float | None = None
    kl: float | None = None
    repetition: float | None = None
    latency: float | None = None
    uncommitted: Sequence[str] = ()
    faults: Sequence[str] = ()


def decide(evidence: Evidence, bounds: Promote, words: Sequence[str], seed: int = 0) -> Decision:
    """Hold the evidence against the bounds. Without a champion only what stands on its own counts."""
    checks = []
    for name in METRICS:
        checks += metric_checks(name, getattr(bounds.metrics, name), evidence, bounds, seed)
    unsafe = [answer for answer in evidence.answers if holds_word(answer, words)]
    share = len(unsafe) / len(evidence.answers) if evidence.answers else 0.0
    checks += [
        bounded("reward model's accuracy", evidence.reward_accuracy, floor=bounds.reward_accuracy_floor),
        bounded("KL to SFT, nats an answer", evidence.kl, ceiling=bounds.kl_ceiling),
        bounded("repetition", evidence.repetition, ceiling=bounds.repetition_ceiling),
    ]
    if words:
        checks.append(bounded(f"answers with a listed word ({len(unsafe)})", share, ceiling=bounds.safety_ceiling))
    checks.append(bounded("latency, seconds an answer", evidence.latency, ceiling=bounds.latency_ceiling))
    checks = [check for check in checks if check.bound]
    checks.append(
        Check(
            "uncommitted code",
            ", ".join(evidence.uncommitted) or "none",
            "allowed" if bounds.allow_uncommitted else "none",
            bounds.allow_uncommitted or not evidence.uncommitted,
        )
    )
    checks += [Check("lineage", fault, "complete", False) for fault in evidence.faults]
    return Decision(checks)


def metric_checks(name: str, gate: MetricGate, evidence: Evidence, bounds: Promote, seed: int) -> list[Check]:
    """The checks that one metric's bounds ask for."""
    values = evidence.challenger.get(name, [])
    sign = -1.0 if name in LESS_IS_BETTER else 1.0
    checks = []
    if gate.floor is not None:
        found = mean(values)
        checks.append(bounded(name, found, ceiling=gate.floor) if sign < 0 else bounded(name, found, floor=gate.floor))
    if evidence.champion is None or (gate.epsilon is None and gate.delta is None):
        return checks
    champion = evidence.champion.get(name, [])
    if not values or len(values) != len(champion):
        return [*checks, Check(f"{name}, compared", f"{len(values)} and {len(champion)} rows", "the same rows", False)]
    differences = [sign * (ours - theirs) for ours, theirs in zip(values, champion, strict=True)]
    low, high = bootstrap_interval(differences, bounds.confidence, bounds.bootstrap_samples, seed)
    middle = sum(differences) / len(differences)
    value = f"{middle:+.4g} [{low:+.4g}, {high:+.4g}]"
    if gate.epsilon is not None:
        passed = low >= -gate.epsilon
        checks.append(Check(f"{name}, not worse than champion", value, f"low end ≥ {-gate.epsilon:g}", passed))
    if gate.delta is not None:
        checks.append(Check(f"{name}, better than champion", value, f"low end > {gate.delta:g}", low > gate.delta))
    return checks


def bounded(name: str, value: float | None, floor: float | None = None, ceiling: float | None = None) -> Check:
    """A check of one number; its bound is "" where none is asked for. What was not measured, or is NaN, fails."""
    bound = f"≥ {floor:g}" if floor is not None else f"≤ {ceiling:g}" if ceiling is not None else ""
    if value is None:
        return Check(name, "not measured", bound, False)
    passed = value >= floor if floor is not None else ceiling is None or value <= ceiling
    return Check(name, f"{value:.4g}", bound, passed)


def bootstrap_interval(values: Sequence[float], confidence: float, samples: int, seed: int) -> tuple[float, float]:
    """The percentile interval of the mean of `values`, by `samples` resamples; the same each time for one seed."""
    import numpy as np

    data = np.asarray(values, float)
    if not np.isfinite(data).all():
        return float("nan"), float("nan")  # passes no check
    random = np.random.default_rng(seed)
    means = [data[random.integers(0, len(data), len(data))].mean() for _ in range(samples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def read_words(path: str | Path | None) -> list[str]:
    """The words of a list, one a line; blank lines and those that begin with # do not count.

    Raises:
        InputError: the file is missing or is not UTF-8.
    """
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"promote.safety_words: {path} cannot be read ({error}); name a file with a word a line"
        ) from None
    return [word for line in lines if (word := normal(line)) and not line.lstrip().startswith("#")]


def holds_word(text: str, words: Sequence[str]) -> bool:
    """Does the text hold one of the words (as `read_words` gives them)? Case and width of letters do not matter.

    A word of Latin letters counts where it stands alone ("ass" is not in "class"); Chinese has no blanks between words.
    """
    text = normal(text)
    return any(_stands_in(text, word) for word in words)


def _stands_in(text: str, word: str) -> bool:
    at = text.find(word)
    while at >= 0:
        before, after = text[at - 1 : at] if at else "", text[at + len(word) : at + len(word) + 1]
        joined = (_latin(before) and _latin(word[0])) or (_latin(after) and _latin(word[-1]))
        if not joined:
            return True
        at = text.find(word, at + 1)
    return False


def _latin(character: str) -> bool:
    return character.isascii() and character.isalnum()


def normal(text: str) -> str:
    """The text as far as the word list sees it."""
    return unicodedata.normalize("NFKC", text).casefold().strip()


def read_rows(folder: Path) -> tuple[dict[str, list[float]], dict[str, list[float]], list[str]]:
    """Of reports/judge: the challenger's and the champion's values by metric, and the challenger's answers."""
    rows = read_jsonl(folder / "rows.jsonl")
    values: dict[str, dict[str, list[float]]] = {"challenger": {}, "champion": {}}
    for row in rows:
        for who, found in values.items():
            for name, value in row.get(who, {}).items():
                if name != "answer":
                    found.setdefault(name, []).append(value)
    return values["challenger"], values["champion"], [row["challenger"]["answer"] for row in rows]
