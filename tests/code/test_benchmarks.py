"""The benchmarks take minutes and mostly a GPU; here they are only seen to start."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = sorted(path.stem for path in Path(__file__).parents[2].joinpath("benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_a_benchmark_uses_exists(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__
