"""Recipes: every one is valid, names registered data and says how it is run; wrong ones are refused."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from flows.cells import ENDS, plan
from flows.cells import read_recipe as read_comparison
from flows.recipes import read_recipe
from flows.rlhf_pipeline import check
from flows.workspace import parse_overrides
from glm.errors import InputError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
COMPARISONS = [path for path in RECIPES if path.name.startswith("compare_")]
RUNS = [path for path in RECIPES if path not in COMPARISONS]


def launch_lines(path: Path) -> list[str]:
    """The commands on top of a recipe that name it."""
    return re.findall(rf"glmflow (?:run|compare) recipes/{re.escape(path.name)}[^#\n]*", path.read_text("utf-8"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_recipe_is_valid_as_its_launch_line_gives_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(path)
    lines = launch_lines(path)
    assert lines
    monkeypatch.setattr("tasks.inputs.local_files", lambda *_: None)  # what has to be unpacked by hand is not here
    monkeypatch.setattr("tasks.inputs.check_engine", lambda _: None)  # nor what has to be installed
    for line in lines:
        words = shlex.split(line)
        pairs = [word for before, word in pairwise(words) if before == "-S"]
        check(ROOT, recipe.overrides | parse_overrides(pairs), recipe.until)
    text = path.read_text("utf-8")
    assert all(word in text for word in ("# Data:", "# Needs:", "# Published"))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_is_valid(path: Path) -> None:
    cells, steps = plan(read_comparison(path))
    assert len(cells) > 1 and steps[-1] in ENDS and launch_lines(path)


def test_the_table_of_recipes_has_them_all() -> None:
    table = (ROOT / "recipes" / "README.md").read_text("utf-8")
    assert re.findall(r"^\| \[(\w+\.yaml)\]", table, re.MULTILINE) == [path.name for path in RECIPES]


def test_weights_of_datasets_are_one_value(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "until: sft\nseed: 3\ndata: {sft: {a: 0.2, b: 0.8}, placeholders: {NAME: x}}\nmodel: {embedded: {seed: 1}}\n"
    )
    recipe = read_recipe(path)
    assert recipe.until == "sft" and recipe.overrides == {
        "seed": 3,
        "data.sft": {"a": 0.2, "b": 0.8},
        "data.placeholders": {"NAME": "x"},
        "model.embedded.seed": 1,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("a: [", "not a YAML file"),
        ("- 1\n", "expected sections"),
        ("variants: {a: {}}\n", "glmflow compare"),
        ("until: train\n", "no step of the pipeline"),
        ("sft: {learning_rte: 1}\n", "did you mean sft.learning_rate"),
        ("data: {sft: [identity]}\n", "<NAME>, <AUTHOR>"),
        ("data: {sft: [identity], placeholders: {NAME: x}}\n", "<AUTHOR>"),
        ("data: {reward: []}\n", "data.reward: empty"),
        ("data: {ppo: []}\n", "data.ppo: empty"),
    ],
)
def test_what_is_wrong_is_said(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=re.escape(said)):
        recipe = read_recipe(path)
        check(ROOT, recipe.overrides, recipe.until)
