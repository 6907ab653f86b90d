"""One stage of dvc.yaml as Prefect sees it: run through DVC, cached by DVC's own hash.

DVC's run cache is the pipeline's one memory (https://dvc.org/doc/user-guide/pipelines/run-cache). A stage's Prefect
cache key is its key there, a hash of command, dependencies (data and code) and parameters. It exists only while the
outputs on disk are what dvc.lock says, so a deleted output, edited code or half-written model is never taken for a hit.

The key comes from private functions of DVC (hence `dvc<4` in pyproject.toml); tests/pipeline/test_flow.py checks it
against the folders of .dvc/cache/runs.
"""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger
from ruamel.yaml import YAML

from flows import ROOT, guard
from flows.dvc_repair import (
    drop_corrupted,
    drop_corrupted_lists,
    drop_corrupted_lock_file,
    drop_corrupted_runs,
    drop_dead_locks,
)
from flows.errors import RefusedError, StageError
from flows.interrupt import interruptible
from flows.progress import progress_file, write_progress

EXECUTED = re.compile(r"Running stage '")
RESTORED = re.compile(r"Stage '.*' is cached - skipping run, checking out outputs")
BUSY = "it is being blocked by"  # what DVC says, and gives up, when a plain `dvc repro` is at the same files
REFUSED = re.compile(r"exited with 2$", re.MULTILINE)
DVC_SAYS = re.compile(r"Running stage '|> python |ERROR: failed to reproduce")
TAIL = 25  # lines of a failed stage's output that are shown


def run_cache_key(step: str, root: Path) -> str | None:
    """The key of `step` in DVC's run cache; None if the stage would have to run, or its outputs to be restored."""
    return run_cache_keys([step], root).get(step)


def run_cache_keys(steps: Sequence[str], root: Path) -> dict[str, str]:
    """The keys of the first of `steps` that are up to date, until one is not. One look at all of them is cheap."""
    from dvc.exceptions import DvcException
    from dvc.stage.cache import _can_hash, _get_stage_hash

    keys: dict[str, str] = {}
    with suppress(DvcException), open_stages(root) as stages:  # a file is busy or missing: `dvc repro` waits or says so
        for step in steps:
            if not _can_hash(stages[step]) or stages[step].changed():
                break
            keys[step] = _get_stage_hash(stages[step])
    return keys


@contextmanager
def open_stages(root: Path) -> Iterator[Mapping[str, Any]]:
    """DVC's stages of `root` by name, while nobody else changes them."""
    from dvc.dvcfile import load_file
    from dvc.repo import Repo

    with Repo(str(root), _wait_for_lock=True) as repo, repo.lock:
        # by absolute path: a relative one is looked up in the current folder, not in `root`
        yield load_file(repo, str(root / "dvc.yaml")).stages


def output_hashes(step: str, root: Path) -> dict[str, str]:
    """The outputs of `step` with their hashes, from dvc.lock."""
    locked = YAML(typ="safe").load((root / "dvc.lock").read_text(encoding="utf-8"))
    return {out["path"]: out["md5"] for out in locked["stages"][step]["outs"]}


def cache_folder(root: Path) -> Path:
    """DVC's cache of the checkout or workspace `root`."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return Path(repo.cache.local_cache_dir)


def stage_environment() -> dict[str, str]:
    """The environment of DVC and its stages: this Python's programs come first on PATH, and nobody phones home."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def reproduce(step: str, root: Path, time_limit: float, environment: dict[str, str]) -> bool:
    """Bring the outputs of `step` up to date with `dvc repro --single-item`. True: the stage's command was executed.

    The stages of all runs on this checkout and its workspaces take turns: there is one GPU, and two runs that want the
    same thing do it once.

    Raises:
        StageError: the stage failed, or needed more than `time_limit` seconds.
    """
    logger = get_run_logger()
    progress = progress_file(root)
    environment = stage_environment() | environment | {"GLMFLOW_PROGRESS": str(progress)}
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", step]

    def on_wait() -> None:
        logger.info("Waiting for a stage of another run")
        write_progress(progress, step, "waiting for a stage of another run")

    deadline = time.monotonic() + time_limit
    while True:
        output: deque[str] = deque(maxlen=TAIL)
        executed = False
        with guard.lock(ROOT / ".dvc" / "tmp" / "stage.lock", on_wait) as descriptor:
            progress.unlink(missing_ok=True)
            with guard.running(command, cwd=root, env=environment, time_limit=time_limit, hold=[descriptor]) as process:
                for line in guard.lines(process):
                    executed = executed or EXECUTED.match(line) is not None
                    output.append(line.rstrip())
                    logger.info(line.rstrip())
        text = "\n".join(output)
        if process.returncode == 0:
            if RESTORED.search(text) and (wrong := drop_corrupted(output_hashes(step, root), root, cache_folder(root))):
                logger.warning("%s: DVC's cache was corrupted and is made again: %s", step, ", ".join(wrong))
                continue
            if executed and drop_corrupted_lists(output_hashes(step, root), cache_folder(root)):
                commit = [sys.executable, "-m", "dvc", "commit", "--force", step]
                subprocess.run(commit, cwd=root, env=environment, check=True, capture_output=True)
            return executed
        repaired = [*drop_corrupted_runs(cache_folder(root)), *drop_corrupted_lock_file(root), *drop_dead_locks(root)]
        if repaired:
            logger.warning("%s: trying again without %s", step, ", ".join(repaired))
            continue
        if BUSY not in text or time.monotonic() > deadline:
            break
        on_wait()
        interruptible(time.sleep, 2)

    if process.returncode == guard.TIMED_OUT:
        raise StageError(f"{step}: stopped after its time limit of {time_limit:g} seconds\n{text}")
    if REFUSED.search(text):
        raise RefusedError("\n".join(line for line in output if not DVC_SAYS.match(line)))
    raise StageError(f"{step}: failed (exit status {process.returncode})\n{text}")
