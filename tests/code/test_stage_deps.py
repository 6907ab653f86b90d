"""dvc.yaml's code dependencies are exactly what each stage imports: no stale result, and no retraining for nothing."""

import ast
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML

from glm.config import Algorithm
from tasks import STEPS, programs
from tasks.lineage import stage_entry

ROOT = Path(__file__).parents[2]
ALGORITHMS = get_args(Algorithm)
PIPELINE = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
STAGES = YAML(typ="safe").load(PIPELINE)["stages"]
# They frame and record a run and cannot change what it computes; parameters are dependencies by their values.
OBSERVERS = {
    "tasks/__init__.py",
    "tasks/stage.py",
    "tasks/launch.py",
    "tasks/step_run.py",
    "tasks/tracking.py",
    "tasks/lineage.py",
    "tasks/logged_models.py",
    "glm/__init__.py",
    "glm/config.py",
    "glm/py.typed",
    *(file.relative_to(ROOT).as_posix() for file in (ROOT / "glm" / "sections").glob("*.py")),
}


def module_file(name: str) -> Path | None:
    """The file of a module of this project, None for everything else."""
    path = ROOT / Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imported(file: Path) -> set[Path]:
    """The project's files that a file imports, inside functions too, and the packages above them."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                if path := module_file(".".join(parts[:end])):
                    found.add(path)
    return found


@cache
def closure(file: Path) -> set[str]:
    """All project files that a program uses, observers and what only they use left out."""
    seen: set[Path] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current in seen or str(current.relative_to(ROOT)) in OBSERVERS:
            continue
        seen.add(current)
        waiting += imported(current)
    return {str(path.relative_to(ROOT)) for path in seen}


def listed(step: str, algorithm: str) -> tuple[set[str], set[str]]:
    """(files, folders) of this project's code among a stage's dependencies."""
    code = [dep for dep in stage_entry(step, algorithm, ROOT / "dvc.yaml").deps if dep.startswith(("tasks/", "glm/"))]
    return {dep for dep in code if dep.endswith(".py")}, {dep for dep in code if not dep.endswith(".py")}


def used_by(step: str, algorithm: str) -> set[str]:
    """All project files that the stage's program uses."""
    return closure(ROOT / "tasks" / f"{programs(algorithm)[STEPS.index(step)]}.py")


def test_the_steps_are_the_stages() -> None:
    assert tuple(STAGES) == STEPS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("step", STAGES)
def test_every_module_that_a_stage_uses_is_a_dependency(step: str, algorithm: str) -> None:
    files, folders = listed(step, algorithm)
    missing = {
        used
        for used in used_by(step, algorithm)
        if used not in files and not any(used.startswith(f"{folder}/") for folder in folders)
    }
    assert not missing, f"{step}: add to dvc.yaml: {sorted(missing)}"


@pytest.mark.parametrize("step", STAGES)
def test_no_dependency_is_listed_for_nothing(step: str) -> None:
    # What several algorithms share is listed for all: one list cannot depend on `algorithm`.
    files, folders = (set.union(*sets) for sets in zip(*(listed(step, name) for name in ALGORITHMS), strict=True))
    used = set.union(*(used_by(step, name) for name in ALGORITHMS))
    idle = {file for file in files if file not in used}
    idle |= {folder for folder in folders if not any(path.startswith(f"{folder}/") for path in used)}
    assert not idle, f"{step}: take out of dvc.yaml: {sorted(idle)}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("step", STAGES)
def test_every_listed_file_exists(step: str, algorithm: str) -> None:
    files, folders = listed(step, algorithm)
    assert all((ROOT / path).exists() for path in files | folders)
