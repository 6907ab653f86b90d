"""The maths and the text of a comparison's table, and how a command line becomes variants."""

import csv
import io
from pathlib import Path

import pytest

from flows import ROOT
from flows.arguments import comparison_parser
from flows.cells import differences, parse_settings, parse_variant, plan, product, read_recipe
from flows.compare_methods import read_arguments
from flows.comparison_report import Outcome, Report
from glm.errors import InputError
from glm.evaluation.comparison import Column, Result, draw, rows, table_csv, text

LOSS = Column("loss", "loss", 2)
SIZE = Column("size", "size", 0)
RESULTS = [
    Result("lora", 1, {"loss": 2.0, "size": 1000.0}),
    Result("full", 1, {"loss": 1.5}),
    Result("lora", 2, {"loss": 4.0, "size": 1000.0}),
    Result("full", 2, {}, error="out of memory"),
]


def test_mean_and_spread_over_seeds() -> None:
    lora, full = rows(RESULTS)
    assert (lora.variant, lora.seeds, lora.failed, lora.mean["loss"]) == ("lora", 2, 0, 3.0)
    assert lora.spread["loss"] == pytest.approx(2**0.5)  # of the sample: n - 1
    assert (full.seeds, full.failed, full.mean, full.spread) == (1, 1, {"loss": 1.5}, {})


def test_text_of_a_cell() -> None:
    lora, full = rows(RESULTS)
    assert [text(lora, LOSS), text(full, LOSS)] == ["3.00 ± 1.41", "1.50"]
    assert [text(lora, SIZE), text(full, SIZE)] == ["1,000", ""]  # equal by nature: no spread


def test_an_interval_follows_the_mean() -> None:
    (row,) = rows([Result("ppo", 1, {"win_rate": 0.62, "win_rate_low": 0.553, "win_rate_high": 0.687})])
    assert text(row, Column("win_rate", "win rate", 2)) == "0.62 [0.55, 0.69]"


def test_csv_keeps_every_digit() -> None:
    lora, full = csv.DictReader(io.StringIO(table_csv(rows(RESULTS), [LOSS, SIZE])))
    assert float(lora["loss_std"]) == 2**0.5
    assert (full["loss"], full["loss_std"], full["size"], full["failed"]) == ("1.5", "", "", "1")


def test_the_picture_has_a_bar_a_variant_and_whiskers(tmp_path: Path) -> None:
    figure = draw(rows(RESULTS), [LOSS, SIZE], "title")
    loss, size = figure.axes
    assert [round(bar.get_height(), 6) for bar in loss.patches] == [3.0, 1.5]
    assert len(size.patches) == 1 and len(loss.collections) + len(loss.containers) > 2
    figure.savefig(tmp_path / "plot.png")


def outcomes(*variants: str) -> list[Outcome]:
    return [
        Outcome(f"c-{variant}-seed{seed}", variant, seed, None, {"loss": 2.0 + seed}, {"base": {"loss": 5.0}})
        for seed in (1, 2)
        for variant in variants
    ]


def test_the_base_is_one_row_unless_data_or_model_differ() -> None:
    shared = Report("c", "evaluate_sft", outcomes("a", "b"), ["sft.lora_rank"], None, None)
    assert [row.variant for row in shared.rows] == ["base", "a", "b"]
    assert shared.rows[0].mean == {"loss": 5.0}
    own = Report("c", "evaluate_sft", outcomes("a", "b"), ["data.sft"], None, None)
    assert [row.variant for row in own.rows] == ["base of a", "base of b", "a", "b"]


def test_settings_are_combined_and_named() -> None:
    settings = parse_settings(["sft.method=lora,freeze", "sft.learning_rate=1e-3,2e-3"])
    assert settings == {"sft.method": ["lora", "freeze"], "sft.learning_rate": [1e-3, 2e-3]}
    variants = product(settings)
    assert list(variants) == [f"{m}+learning_rate={r}" for m in ("lora", "freeze") for r in (0.001, 0.002)]
    assert variants["lora+learning_rate=0.002"] == {"sft.method": "lora", "sft.learning_rate": 2e-3}
    assert parse_settings(["data.sft=[a,b],[c]"]) == {"data.sft": [["a", "b"], ["c"]]}
    assert product({}) == {"params.yaml": {}}


def test_a_variant_has_a_name_and_settings() -> None:
    assert parse_variant("wide:sft.lora_target=[q,k],sft.lora_rank=64") == (
        "wide",
        {"sft.lora_target": ["q", "k"], "sft.lora_rank": 64},
    )
    for wrong in ("x", "sft.lora_rank=4", ":sft.lora_rank=4"):
        with pytest.raises(InputError, match="expected NAME:KEY=VALUE"):
            parse_variant(wrong)


@pytest.mark.parametrize("pair", ["sft.lora_rank", "=4", "sft.lora_rank=", "sft.lora_rank=4,4"])
def test_wrong_settings_are_refused(pair: str) -> None:
    with pytest.raises(InputError, match="-S"):
        parse_settings([pair])


def test_a_recipe_says_what_is_wrong_in_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nvariants: {a: {sft.lora_rank: 4}}\nseed: [1]\n")
    with pytest.raises(InputError, match="unknown key seed; known here: name, variants, seeds"):
        read_recipe(path)
    path.write_text("variants: {a: {sft.lora_rank: 4}}\nseeds: [one]\n")
    with pytest.raises(InputError, match=r"seeds\.0.*'one'"):
        read_recipe(path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/compare_*.yaml")), ids=lambda path: path.name)
def test_the_recipes_are_right(path: Path) -> None:
    recipe = read_recipe(path)
    assert len(plan(recipe)[0]) == len(recipe.variants) * len(recipe.seeds or [42])


def test_what_differs_between_parameters() -> None:
    one = {"seed": 1, "sft": {"lora_rank": 4, "learning_rate": 0.1}}
    other = {"seed": 2, "sft": {"lora_rank": 8, "learning_rate": 0.1}}
    assert differences({"a": one, "b": other}) == {"a": {"sft.lora_rank": 4}, "b": {"sft.lora_rank": 8}}


def planned(*words: str) -> tuple[list[tuple[str, dict]], list[str]]:
    """Name and overrides of the cells that a command line asks for, and their steps."""
    cells, steps = plan(read_arguments(comparison_parser().parse_args(words)))
    return [(cell.name, cell.overrides) for cell in cells], steps


def test_cells_go_seed_by_seed_and_as_far_as_they_differ() -> None:
    cells, steps = planned("-S", "sft.lora_rank=4,8", "-S", "sft.num_train_epochs=2", "--seeds", "1,2", "--name", "n")
    assert [name for name, _ in cells] == [f"n-lora_rank={rank}-seed{seed}" for seed in (1, 2) for rank in (4, 8)]
    assert cells[0][1] == {"sft.num_train_epochs": 2, "sft.lora_rank": 4, "seed": 1}
    assert steps[-1] == "evaluate_sft"
    assert planned("-S", "reward.learning_rate=1e-3,2e-3")[1][-1] == "evaluate"
    assert planned("-S", "sft.lora_rank=4,8", "--until", "evaluate")[1][-1] == "evaluate"
    assert planned("--seeds", "1,2")[0] == [(f"compare-params.yaml-seed{seed}", {"seed": seed}) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lora,lorra"], "variant 'lorra': .*'lorra'"),
        (["-S", "sft.lora_rnk=4,8"], "did you mean sft.lora_rank"),
        (["-S", "sft.lora_rank=4,many"], "found 'many'"),
        (["-S", "data.sft=nothing,reviews_sft"], "nothing"),
        (["-S", "export.dtype=float32,float16"], "makes no difference"),
        (["-S", "reward.learning_rate=1e-3,2e-3", "--until", "evaluate_sft"], "makes no difference"),
        (["-S", "sft.lora_rank=4,8", "--until", "export"], "evaluate_sft or evaluate"),
        (["-S", "seed=1,2"], "--seeds"),
        (["--variant", "a:sft.lora_rank=4", "--variant", "b:sft.lora_rank=4"], "'a' and 'b' are the same"),
        (["--variant", "a/b:sft.lora_rank=4"], "variant 'a/b'"),
        (["--variant", "a:sft.lora_rank=4", "--variant", "a:sft.lora_rank=8"], "given twice"),
        (["--seeds", "1,1"], "named twice"),
        (["--seeds", "one"], "whole numbers"),
        (["--name", "../up"], "name.*'../up'"),
        (["none.yaml"], "no such file"),
    ],
)
def test_wrong_comparisons_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(*words)
