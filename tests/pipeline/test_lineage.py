"""The parts of telling where a model came from; test_real_stages.py has the whole."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.lineage import Lineage, Node
from flows.lineage_view import columns_of, draw, tree
from tasks.record import inconsistencies, uncommitted_files, uncommitted_patch
from tests.pipeline.conftest import Project


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path / "work", tmp_path, None)
    (project.root / "data").mkdir(parents=True)
    (project.root / "code.py").write_text("a = 1\n")
    (project.root / "data" / "info.json").write_text("{}\n")
    project.git("init", "--quiet")
    project.commit()
    monkeypatch.chdir(project.root)
    return project


def test_the_patch_makes_the_commit_what_was_there(repository: Project) -> None:
    assert uncommitted_files("data") == [] and uncommitted_patch("data") == b""
    Path("code.py").write_text("a = 2\n")
    Path("new name.bin").write_bytes(b"\x00\xff")
    Path("params.yaml").write_text("seed: 1\n")
    Path("data/rows.jsonl").write_text("{}\n")  # new data is kept by content
    Path("data/info.json").write_text("{ }\n")
    before = repository.git("status", "--porcelain")
    assert sorted(uncommitted_files("data")) == ["code.py", "data/info.json", "new name.bin"]
    assert uncommitted_files("data", ours=["data"]) == ["code.py", "new name.bin"]
    patch = uncommitted_patch("data")
    assert repository.git("status", "--porcelain") == before  # the index is as it was

    repository.git("stash", "--quiet", "--include-untracked")
    Path("../change.patch").write_bytes(patch)
    repository.git("apply", "../change.patch")
    assert Path("code.py").read_text() == "a = 2\n" and Path("new name.bin").read_bytes() == b"\x00\xff"
    assert not Path("data/rows.jsonl").exists()


def test_what_does_not_fit_together_is_said(repository: Project) -> None:
    assert inconsistencies({}) == ["no dvc.lock: the steps were not run by DVC"]
    lock = {
        "sft": {"deps": [{"path": "code.py", "md5": "0"}], "outs": [{"path": "models/sft", "md5": "1"}]},
        "reward": {"deps": [{"path": "models/sft", "md5": "2"}, {"path": "gone.py", "md5": "3"}]},
    }
    found = inconsistencies(lock)
    assert "sft: code.py has changed since" in found
    assert "reward: was run on another models/sft than sft made since" in found
    assert "reward: gone.py is gone since" in found
    assert "export: not in dvc.lock" in found


def test_the_picture_goes_from_left_to_right() -> None:
    nodes = [
        Node("a", "data", "1"),
        Node("b", "rows", "2", ["a"]),
        Node("c", "model", "3", ["a", "b"]),
        Node("d", "model", "4", ["b"]),
    ]
    assert [[node.name for node in column] for column in columns_of(nodes)] == [["a"], ["b"], ["c", "d"]]


def test_all_of_it_is_shown(tmp_path: Path) -> None:
    """In a narrow terminal and a pipe too; and the picture's folder need not be there."""
    metrics = {f"metric_{number}": 1.0 for number in range(6)}
    nodes = [Node("a", "data", "1"), Node("b", "model", "2", ["a"], {"metrics": metrics})]
    facts = {"run": "r", "commit": "0" * 40, "uncommitted": [], "requirements_lock_md5": None, "faults": []}
    lineage = Lineage("models/b", "0" * 32, facts, nodes)
    text = StringIO()
    Console(file=text, width=50).print(tree(lineage))
    assert all(name in text.getvalue() for name in metrics)
    draw(lineage, tmp_path / "new" / "b.svg")
    assert "<svg" in (tmp_path / "new" / "b.svg").read_text()
