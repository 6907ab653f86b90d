"""Where a model came from, told by the store alone, and the same model made again from that."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from flows.lineage import Node
from flows.lineage_view import columns_of
from flows.workspace import write_overrides
from tasks.record import inconsistencies, uncommitted_files, uncommitted_patch
from tests.pipeline.conftest import Project
from tests.pipeline.test_real_stages import TINY, locked, real_project  # noqa: F401 (a fixture)

GLMFLOW = [sys.executable, "-m", "apps.cli"]
CHAMPION = "models:/rlhf-policy@champion"


def test_a_champion_tells_its_lineage_in_a_fresh_checkout_and_is_made_again(
    real_project: Project,  # noqa: F811
    tmp_path: Path,
) -> None:
    project = real_project
    feedback = project.root / "data" / "feedback" / "monday.jsonl"
    feedback.write_text(
        json.dumps({"prompt": [{"role": "user", "content": "写评论"}], "chosen": "好", "rejected": "坏"}) + "\n"
    )
    write_overrides(project.root / "params.yaml", {"data.reward": ["reviews_pairs", "feedback"]})
    project.commit()
    note = project.root / "glm" / "errors.py"
    committed = note.read_text()
    note.write_text(f"{committed}\n# not committed\n")
    project.flow()
    project.command(*GLMFLOW, "promote", "challenger", "--reason", "to see where it came from")
    made = locked(project.root)

    # the folder moves on; only git, DVC's cache and the store are left
    note.write_text(committed)
    feedback.unlink()
    for folder in ("models", "prepared", "metrics", "reports", "runs", ".cache"):
        shutil.rmtree(project.root / folder)
    (project.root / "dvc.lock").unlink()
    shown = project.command(
        *GLMFLOW, "lineage", CHAMPION, "--json", str(tmp_path / "l.json"), "--graph", str(tmp_path / "l.png")
    ).stdout
    assert "uncommitted changes in glm/errors.py" in shown
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "l.json").read_text())
    nodes = {node["name"]: node for node in found["nodes"]}
    assert nodes["feedback"]["facts"]["rows"]["reward"]["read"] == 1
    assert nodes["models/export"]["hash"] == made["models/export"]
    assert "models/reward" in nodes["models/ppo"]["made_from"]
    assert "reward: reward/train tokenised" in nodes["models/reward"]["made_from"]
    assert nodes["models/sft"]["facts"]["metrics"]["eval_loss"] > 0
    assert nodes["models/sft"]["facts"]["machine"]["machine.threads"] == "1"
    assert found["facts"]["commit"] == project.git("rev-parse", "HEAD").strip()

    # an export is described from the store too
    project.command(*GLMFLOW, "export", CHAMPION, str(tmp_path / "int4"), "--quantization", "cpm-int4")
    card = (tmp_path / "int4" / "README.md").read_text()
    assert "| feedback | reward | 1 |" in card and nodes["feedback"]["hash"] in card
    assert f"| commit | {found['facts']['commit']} |" in card and "| not committed | glm/errors.py |" in card
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_bit"] == 4

    again = project.command(*GLMFLOW, "reproduce", CHAMPION).stdout
    assert "outputs are equal, bit by bit" in again
    assert "recorded uncommitted changes in glm/errors.py" in again
    assert project.git("status", "--porcelain") == ""
    assert not list((project.root / ".worktrees").iterdir())


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
