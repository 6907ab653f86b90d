"""What DVC does not notice or cannot get over by itself, in a repository of one stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.dvc_repair import (
    drop_corrupted,
    drop_corrupted_lists,
    drop_corrupted_lock_file,
    drop_corrupted_runs,
    drop_dead_locks,
)
from tasks.lineage import content_hash, hashes_in_lock
from tests.pipeline.conftest import Project

STAGE = """
stages:
  copy:
    cmd: mkdir out && cp in out/a && cp in out/b
    deps: [in]
    outs: [out]
"""


@pytest.fixture
def repository(tmp_path: Path) -> Project:
    project = Project(tmp_path / "work", tmp_path, None)
    project.root.mkdir()
    (project.root / "in").write_text("twelve bytes")
    (project.root / "dvc.yaml").write_text(STAGE)
    project.dvc("init", "--quiet", "--no-scm")
    project.dvc("repro")
    return project


def damage(path: Path) -> None:
    """Cut a file off, as a bad disk or a power failure does: it looks as before, and as read-only."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:10])
    path.chmod(mode)


def test_a_corrupted_cache_file_is_found_where_it_was_restored(repository: Project) -> None:
    root, cache = repository.root, repository.root / ".dvc" / "cache"
    hashes = hashes_in_lock(root / "dvc.lock")
    assert drop_corrupted(hashes, root, cache) == []
    (entry,) = (path for path in cache.glob("files/md5/??/*") if path.read_bytes() == b"twelve bytes")
    damage(entry)
    shutil.rmtree(root / "out")
    assert "skipping run, checking out" in repository.dvc("repro")
    assert (root / "out" / "a").read_text() == "twelve byt"  # DVC trusts it
    assert "up to date" in repository.dvc("status")

    assert drop_corrupted(hashes, root, cache) == ["out"]
    assert not entry.exists() and not (root / "out").exists()
    assert "Running stage" in repository.dvc("repro")
    assert (root / "out" / "a").read_text() == "twelve bytes" == entry.read_text()


def test_a_sound_cache_file_is_read_once(repository: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = repository.root, repository.root / ".dvc" / "cache"
    hashes = hashes_in_lock(root / "dvc.lock")
    read = []
    monkeypatch.setattr("flows.dvc_repair.content_hash", lambda path: read.append(path) or content_hash(path))
    for _ in range(2):
        assert drop_corrupted(hashes, root, cache) == []
    assert len(read) == 2  # the folder's list, and the one content of its files
    os.utime(read[0])
    assert drop_corrupted(hashes, root, cache) == []
    assert read[2:] == read[:1]


def test_a_cut_off_list_of_a_folder_is_written_again(repository: Project) -> None:
    root, cache = repository.root, repository.root / ".dvc" / "cache"
    hashes = hashes_in_lock(root / "dvc.lock")
    (listing,) = cache.glob("files/md5/??/*.dir")
    damage(listing)
    shutil.rmtree(root / "out")
    repository.dvc("repro")
    assert "not in cache" in repository.dvc("status")  # and so for ever

    assert drop_corrupted_lists(hashes, cache)
    repository.dvc("commit", "--force", "copy")
    assert "up to date" in repository.dvc("status")
    assert not drop_corrupted_lists(hashes, cache)


def test_a_cut_off_run_is_removed(repository: Project) -> None:
    (run,) = (repository.root / ".dvc" / "cache").glob("runs/*/*/*")
    assert drop_corrupted_runs(repository.root / ".dvc" / "cache") == []
    damage(run)
    (said,) = drop_corrupted_runs(repository.root / ".dvc" / "cache")
    assert run.name in said and not run.exists()


def test_a_lock_file_that_was_cut_off_is_made_again_from_the_run_cache(repository: Project) -> None:
    lock = repository.root / "dvc.lock"
    whole = lock.read_text()
    assert drop_corrupted_lock_file(repository.root) == []
    # what a kill in the middle of its writing leaves; the last is a whole file of less for DVC
    for left, broken in (("", True), (whole[:8], True), (whole[: whole.index("outs")], False)):
        lock.write_text(left)
        assert bool(drop_corrupted_lock_file(repository.root)) == broken
        assert "Running stage" not in repository.dvc("repro")
        assert lock.read_text() == whole
    lock.write_text(whole.replace("outs", "\n<<<<<<< HEAD\nouts"))
    assert drop_corrupted_lock_file(repository.root) == []


def test_locks_of_other_programs_are_removed_and_those_of_dvc_are_not(repository: Project, tmp_path: Path) -> None:
    locks = repository.root / ".dvc" / "tmp" / "rwlock"
    program = tmp_path / "bin" / "dvc"
    program.parent.mkdir()
    program.write_text("input()")
    with subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE) as dvc:
        holders = [{"pid": pid, "cmd": "dvc repro"} for pid in (os.getpid(), dvc.pid, 2**22 + 1)]
        locks.write_text(json.dumps({"write": {"/out": holders[0]}, "read": {"/in": holders[1:]}}))
        assert len(drop_dead_locks(repository.root)) == 2
        left = json.loads(locks.read_text())
        dvc.communicate(b"\n")
    assert left == {"write": {}, "read": {"/in": [holders[1]]}}
    locks.write_text('{"write"')
    assert "corrupted" in drop_dead_locks(repository.root)[0]
    assert "up to date" in repository.dvc("status")
