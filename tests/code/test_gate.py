"""The gate decides by numbers alone: floors, the paired comparison, words, and what was never committed."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.gate import Evidence, bootstrap_interval, decide, holds_word, read_words
from glm.config import Promote, validate_params
from glm.errors import InputError

NONE: dict[str, Any] = {"floor": None, "epsilon": None, "delta": None}
OFF: dict[str, Any] = {name: NONE for name in ("reward", "nats_per_character", "rouge_l", "bleu_4")}
GOOD = Evidence(
    challenger={"reward": [1.0, 2.0, 3.0], "nats_per_character": [2.0, 2.0], "rouge_l": [20.0], "bleu_4": [5.0]},
    answers=["很好", "不错"],
    reward_accuracy=0.8,
    kl=6.0,
    repetition=0.1,
    latency=0.5,
)


def bounds(metrics: dict[str, Any] | None = None, **values: Any) -> Promote:
    return validate_params({"promote": {"metrics": OFF | (metrics or {}), **values}}).promote


def failed(evidence: Evidence, promote: Promote, words: tuple[str, ...] = ()) -> list[str]:
    return [check.name for check in decide(evidence, promote, words).failed]


def noisy(mean: float, spread: float, rows: int = 200, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(mean, spread) for _ in range(rows)]


def test_a_good_challenger_passes_and_every_check_says_value_and_bound() -> None:
    decision = decide(GOOD, bounds({"reward": NONE | {"floor": 1.5}}, latency_ceiling=1.0), ["坏"])
    assert decision.passed
    assert [(row["name"], row["value"], row["bound"]) for row in decision.as_rows()] == [
        ("reward", "2", "≥ 1.5"),
        ("reward model's accuracy", "0.8", "≥ 0.6"),
        ("KL to SFT, nats an answer", "6", "≤ 25"),
        ("repetition", "0.1", "≤ 0.5"),
        ("answers with a listed word (0)", "0", "≤ 0"),
        ("latency, seconds an answer", "0.5", "≤ 1"),
        ("uncommitted code", "none", "none"),
    ]


@pytest.mark.parametrize(
    ("change", "limits", "name"),
    [
        ({"reward_accuracy": 0.59}, {}, "reward model's accuracy"),
        ({"reward_accuracy": None}, {}, "reward model's accuracy"),
        ({"kl": 25.1}, {}, "KL to SFT, nats an answer"),
        ({"kl": float("nan")}, {}, "KL to SFT, nats an answer"),
        ({"repetition": 0.6}, {}, "repetition"),
        ({"latency": 1.1}, {"latency_ceiling": 1.0}, "latency, seconds an answer"),
        ({"answers": ["很好", "坏透了"]}, {}, "answers with a listed word (1)"),
        ({"uncommitted": ["glm/training/ppo.py"]}, {}, "uncommitted code"),
        ({"faults": ["sft: glm/training/sft.py has changed since"]}, {}, "lineage"),
        ({}, {"metrics": {"reward": NONE | {"floor": 2.1}}}, "reward"),
        ({}, {"metrics": {"nats_per_character": NONE | {"floor": 1.9}}}, "nats_per_character"),
    ],
)
def test_each_bound_refuses_by_itself(change: dict[str, Any], limits: dict[str, Any], name: str) -> None:
    assert failed(replace(GOOD, **change), bounds(**limits), ("坏",)) == [name]


def test_what_is_allowed_passes() -> None:
    assert not failed(replace(GOOD, uncommitted=["a.py"]), bounds(allow_uncommitted=True))
    assert not failed(replace(GOOD, kl=99.0), bounds(kl_ceiling=None))
    assert not failed(replace(GOOD, answers=["坏", "好"]), bounds(safety_ceiling=0.5), ("坏",))
    assert not failed(GOOD, bounds({"nats_per_character": NONE | {"floor": 2.1}}))


def test_without_a_champion_only_floors_count() -> None:
    assert not failed(GOOD, bounds({"reward": NONE | {"delta": 5.0, "epsilon": 0.0}}))


@pytest.mark.parametrize(
    ("gain", "gate", "passes"),
    [
        (0.5, {"delta": 0.0}, True),
        (0.5, {"delta": 0.6}, False),
        (0.0, {"delta": 0.0}, False),  # as good is not better
        (0.0, {"epsilon": 0.0}, True),  # and not worse
        (-0.3, {"epsilon": 0.2}, False),
        (-0.3, {"epsilon": 0.4}, True),
    ],
)
@pytest.mark.parametrize("metric", ["reward", "nats_per_character"])
def test_the_comparison_is_paired_by_row(metric: str, gain: float, gate: dict[str, float], passes: bool) -> None:
    champion = noisy(0, 10)  # rows differ far more than the models do
    sign = -1 if metric == "nats_per_character" else 1
    challenger = [value + sign * gain for value in champion]
    evidence = replace(GOOD, challenger={metric: challenger}, champion={metric: champion})
    assert (not failed(evidence, bounds({metric: NONE | gate}))) == passes


def test_a_gain_that_chance_may_have_made_is_none() -> None:
    champion, challenger = noisy(0, 1, rows=20), noisy(0.2, 1, rows=20, seed=1)
    evidence = replace(GOOD, challenger={"reward": challenger}, champion={"reward": champion})
    assert sum(challenger) > sum(champion)
    assert failed(evidence, bounds({"reward": NONE | {"delta": 0.0}})) == ["reward, better than champion"]


def test_rows_that_do_not_match_and_broken_numbers_are_refused() -> None:
    gate = {"reward": NONE | {"epsilon": 100.0}}
    nothing = replace(GOOD, challenger={}, champion={})  # there is a champion, but no row was judged
    assert failed(nothing, bounds(gate)) == ["reward, compared"]
    short = replace(GOOD, champion={"reward": [1.0]})
    assert failed(short, bounds(gate)) == ["reward, compared"]
    broken = replace(GOOD, champion={"reward": [1.0, float("nan"), 1.0]})
    assert failed(broken, bounds(gate)) == ["reward, not worse than champion"]


def test_the_interval_is_that_of_theory_and_repeats() -> None:
    values = noisy(3, 2, rows=400)
    low, high = bootstrap_interval(values, 0.95, 4000, seed=1)
    middle = sum(values) / len(values)
    spread = (sum((value - middle) ** 2 for value in values) / len(values)) ** 0.5
    assert (low, high) == pytest.approx(
        (middle - 1.96 * spread / 20, middle + 1.96 * spread / 20), abs=0.1 * spread / 20 * 1.96
    )
    assert (low, high) == bootstrap_interval(values, 0.95, 4000, seed=1) != bootstrap_interval(values, 0.95, 4000, 2)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("这是坏话吧", True),
        ("ＢＡＤ word", True),
        ("a badge", False),
        ("很bad的", True),
        ("not bad", True),
        ("forbad, bad", True),
        ("", False),
    ],
)
def test_words_are_found_in_both_scripts(tmp_path: Path, text: str, held: bool) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# a list\n坏话\n\nBad\n", encoding="utf-8")
    words = read_words(path)
    assert words == ["坏话", "bad"]
    assert holds_word(text, words) == held


def test_a_missing_list_is_named() -> None:
    assert read_words(None) == []
    with pytest.raises(InputError, match=r"promote\.safety_words: nowhere\.txt"):
        read_words("nowhere.txt")


def test_the_project_s_own_list_is_readable() -> None:
    assert len(read_words(Path(__file__).parents[2] / "flows" / "safety_words.txt")) > 5
