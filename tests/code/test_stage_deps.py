"""dvc.yaml's code dependencies are exactly what each stage imports: no stale result, and no retraining for nothing."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# They frame and record a run and cannot change what it computes; parameters are dependencies by their values.
OBSERVERS = {
    "tasks/__init__.py",
    "tasks/stage.py",
    "tasks/step_run.py",
    "tasks/tracking.py",
    "tasks/lineage.py",
    "tasks/logged_models.py",
    "glm/__init__.py",
    "glm/config.py",
    "glm/py.typed",
}


def module_file(name: str) -> Path | None:
    """The file of a module of this project, None for everything else."""
    path = ROOT / Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


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


def listed(step: str) -> tuple[set[str], set[str]]:
    """(files, folders) of this project's code among a stage's dependencies."""
    code = [dep for dep in STAGES[step]["deps"] if dep.startswith(("tasks/", "glm/"))]
    return {dep for dep in code if dep.endswith(".py")}, {dep for dep in code if not dep.endswith(".py")}


@pytest.mark.parametrize("step", STAGES)
def test_every_module_that_a_stage_uses_is_a_dependency(step: str) -> None:
    files, folders = listed(step)
    missing = {
        used
        for used in closure(ROOT / "tasks" / f"{step}.py")
        if used not in files and not any(used.startswith(f"{folder}/") for folder in folders)
    }
    assert not missing, f"{step}: add to dvc.yaml: {sorted(missing)}"


@pytest.mark.parametrize("step", STAGES)
def test_no_dependency_is_listed_for_nothing(step: str) -> None:
    files, folders = listed(step)
    used = closure(ROOT / "tasks" / f"{step}.py")
    idle = {file for file in files if file not in used}
    idle |= {folder for folder in folders if not any(path.startswith(f"{folder}/") for path in used)}
    assert not idle, f"{step}: take out of dvc.yaml: {sorted(idle)}"


@pytest.mark.parametrize("step", STAGES)
def test_every_listed_file_exists(step: str) -> None:
    files, folders = listed(step)
    assert all((ROOT / path).exists() for path in files | folders)
