"""A run in a folder of its own: a git worktree of the last commit that shares the checkout's DVC cache.

Runs with overrides and runs of a deployment work here, so that no run edits the checkout. What one made is kept as a
DVC experiment (`dvc exp show`; `dvc exp apply NAME` brings it into the checkout), and the folder is removed, also after
a cancel. The folder of a run that was killed outright is removed when the next one begins: a kernel lock tells which.
"""

import fcntl
import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from flows import ROOT, guard
from flows.dvc_stage import stage_environment
from flows.interrupt import interruptible
from glm.config import load_params
from glm.errors import InputError
from glm.files import write_text

FOLDER = ROOT / ".worktrees"
NOT_CODE = ["dvc.lock"]  # changed by every run; whether it is committed makes no difference to a workspace


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs of a command line, the values read as YAML.

    Raises:
        InputError: a pair has no '=', or its value is not YAML.
    """
    overrides = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"-S {pair!r}: expected NAME=VALUE, such as -S ppo.learning_rate=2e-5")
        overrides[name] = parse_value(name, value)
    return overrides


def parse_value(name: str, text: str) -> Any:
    """One YAML value. `2e-5` is a number here, as for DVC; the YAML standard wants a dot in it."""
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        raise InputError(f"{name}: {text!r} is not a YAML value: {error.problem or error.context}") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def uncommitted() -> list[str]:
    """Files of the checkout that a workspace would not have as they are now: changed ones, and new ones not ignored."""
    status = git("status", "--porcelain", "--untracked-files=all", "--", ".", *(f":!{name}" for name in NOT_CODE))
    return [line[3:] for line in status.splitlines()]


@contextmanager
def workspace(name: str, overrides: Mapping[str, Any]) -> Iterator[Path]:
    """A worktree of HEAD with `overrides` in its params.yaml. A block that ends well is kept as DVC experiment `name`.

    Raises:
        InputError: the overridden parameters are not valid.
    """
    remove_leftovers()
    root = FOLDER / name
    with guard.lock(lock_file(root)):
        try:
            git("worktree", "add", "--detach", str(root), "HEAD")
            load_params(root / "params.yaml", dict(overrides))
            share_cache(root)
            dvc(root, "checkout", "--allow-missing", "--force", "--quiet")
            write_overrides(root / "params.yaml", overrides)
            yield root
            dvc(root, "exp", "save", "--force", "--name", name)
        finally:
            remove(root)


def share_cache(root: Path) -> None:
    """Let DVC in the worktree use the checkout's cache, and its local settings (remotes and their passwords)."""
    local = ROOT / ".dvc" / "config.local"
    if local.exists():
        shutil.copy(local, root / ".dvc" / "config.local")
    cache = dvc(ROOT, "cache", "dir").strip()
    dvc(root, "config", "--local", "cache.dir", str((ROOT / cache).resolve()))


def write_overrides(path: Path, overrides: Mapping[str, Any]) -> None:
    """Set dotted names in a YAML file, keeping its comments."""
    yaml = YAML()
    values = yaml.load(path.read_text(encoding="utf-8"))
    for name, value in overrides.items():
        *sections, key = name.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    text = StringIO()
    yaml.dump(values, text)
    write_text(path, text.getvalue())


def remove_leftovers() -> None:
    """Remove the workspaces whose run is gone."""
    for path in FOLDER.glob("*.lock"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path.with_suffix(""))
        except BlockingIOError:
            pass  # at work
        finally:
            os.close(descriptor)


def remove(root: Path) -> None:
    """Remove a worktree and its lock file, whatever state it is in."""
    shutil.rmtree(root, ignore_errors=True)
    git("worktree", "prune")
    lock_file(root).unlink(missing_ok=True)


def lock_file(root: Path) -> Path:
    """Held as long as the run of this workspace lives."""
    return root.with_name(f"{root.name}.lock")


def author() -> dict[str, str]:
    """Who an experiment's commit is by, for a machine where git has not been told: DVC refuses to guess."""
    if subprocess.run(["git", "config", "user.email"], cwd=ROOT, capture_output=True).returncode == 0:
        return {}
    who = {"NAME": getpass.getuser(), "EMAIL": f"{getpass.getuser()}@{socket.gethostname()}"}
    return {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}


def git(*arguments: str) -> str:
    """The output of a git command in the checkout."""
    return command(["git", *arguments], ROOT)


def dvc(root: Path, *arguments: str) -> str:
    """The output of a DVC command in `root`, which may copy models for minutes."""
    return interruptible(command, [sys.executable, "-m", "dvc", *arguments], root)


def command(words: list[str], cwd: Path) -> str:
    """Run a command and return its output; its complaint becomes the error's text."""
    environment = author() | stage_environment()
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
