"""A run in a folder of its own: a git worktree of the last commit that shares the checkout's DVC cache.

Runs with overrides and runs of a deployment work here, so that no run edits the checkout. What one made is kept as a
DVC experiment (`dvc exp show`; `dvc exp apply NAME` brings it into the checkout), and the folder is removed, also after
a cancel. The folder of a run that was killed outright is removed when the next one begins: a kernel lock tells which.

With GLMFLOW_DVC_REMOTE set, data and results of other machines are fetched from there before, and the experiment goes
there and to git's `origin` after: `dvc exp pull origin NAME` brings it to any other checkout.
"""

import fcntl
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from flows import ROOT, guard
from flows.dvc_repair import drop_corrupted
from flows.dvc_stage import cache_folder, stage_environment
from flows.errors import CommandError
from flows.interrupt import interruptible
from glm.config import load_params
from glm.errors import InputError
from glm.files import write_text
from tasks.lineage import hashes_in_lock

FOLDER = ROOT / ".worktrees"
REMOTE = "GLMFLOW_DVC_REMOTE"  # environment variable: where data and results come from and go to, s3://bucket/path
PAUSES = (10, 60, 300, 600, 0)  # seconds after each try to send a result
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
    except YAMLError as error:
        raise InputError(f"{name}: {text!r} is not a YAML value: {str(error).splitlines()[0]}") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    try:
        json.dumps(value)
    except (TypeError, ValueError):  # dates, sets, lists that hold themselves
        raise InputError(f"{name}: {text!r}: expected a number, a text, or a list or mapping of them") from None
    return value


def uncommitted() -> list[str]:
    """Files of the checkout that a workspace would not have as they are now: changed ones, and new ones not ignored."""
    status = git("status", "--porcelain", "--untracked-files=all", "--", ".", *(f":!{name}" for name in NOT_CODE))
    return [line[3:] for line in status.splitlines()]


@contextmanager
def workspace(
    name: str, overrides: Mapping[str, Any], steps: Sequence[str] = (), like: str | None = None
) -> Iterator[Path]:
    """A worktree of HEAD with `overrides` in its params.yaml, and what HEAD's dvc.lock says was made.

    A block that ends well is kept as DVC experiment `name`.

    `steps` are the stages that the experiment holds; all of them if empty. What an earlier experiment `name` on the
    same commit, or else `like`, has made is there from the start; DVC says what of it is current.

    Raises:
        InputError: the overridden parameters are not valid.
    """
    with worktree(name, overrides) as root:
        if earlier := lock_of(name) or (lock_of(like) if like else ""):
            write_text(root / "dvc.lock", earlier)
        restore(root)
        yield root
        keep(root, name, steps)


@contextmanager
def worktree(name: str, overrides: Mapping[str, Any]) -> Iterator[Path]:
    """A worktree of HEAD with `overrides` in its params.yaml, without any output or data of DVC's yet."""
    remove_leftovers()
    root = FOLDER / name
    with guard.lock(lock_file(root)):
        try:
            git("worktree", "add", "--detach", str(root), "HEAD")
            load_params(root / "params.yaml", dict(overrides))
            share_cache(root)
            write_overrides(root / "params.yaml", overrides)
            yield root
        finally:
            remove(root)


def restore(root: Path) -> None:
    """Bring what DVC tracks in the worktree out of the cache, or the remote of REMOTE, as far as it is there."""
    bring = ["pull", "--run-cache"] if REMOTE in os.environ else ["checkout"]
    dvc(root, *bring, "--allow-missing", "--force", "--quiet")
    if wrong := drop_corrupted(hashes_in_lock(root / "dvc.lock"), root, cache_folder(root)):
        get_run_logger().warning("DVC's cache was corrupted and is made again: %s", ", ".join(wrong))


def keep(root: Path, name: str, steps: Sequence[str] = ()) -> None:
    """Keep the state of the worktree as a DVC experiment, of `steps` only, and send it where other machines find it."""
    dvc(root, "exp", "save", "--force", "--name", name, *steps)
    if REMOTE in os.environ and "origin" in git("remote").split():
        send(root, name)


def send(root: Path, name: str) -> None:
    """Send an experiment to git's origin and its files to the remote.

    It is tried for a quarter of an hour: the clone of a worker, and all that was computed in it, ends with the run.
    """
    for seconds in PAUSES:
        try:
            if git("rev-parse", "--is-shallow-repository").strip() == "true":
                git("fetch", "--quiet", "--unshallow", "origin")  # Prefect's clone is; DVC pushes from none such
            dvc(root, "exp", "push", "--force", "--run-cache", "origin", name)
            return
        except CommandError as error:
            if not seconds:
                raise
            get_run_logger().warning("%s; trying again in %d s", error, seconds)
            interruptible(time.sleep, seconds)


def lock_of(experiment: str) -> str:
    """dvc.lock of a DVC experiment on the last commit; empty if there is none."""
    head = git("rev-parse", "HEAD").strip()
    commit = git("for-each-ref", "--format=%(objectname)", f"refs/exps/{head[:2]}/{head[2:]}/{experiment}").strip()
    return git("show", f"{commit}:dvc.lock") if commit else ""


def share_cache(root: Path) -> None:
    """Let DVC in the worktree use the checkout's cache, and its local settings (remotes and their passwords).

    The checkpoints are those of the checkout too, so that a stopped step goes on in the next workspace.
    """
    checkpoints = ROOT / ".cache" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (root / ".cache").mkdir(exist_ok=True)
    (root / ".cache" / "checkpoints").symlink_to(checkpoints)
    local = ROOT / ".dvc" / "config.local"
    if local.exists():
        shutil.copy(local, root / ".dvc" / "config.local")
    if REMOTE in os.environ:
        dvc(root, "remote", "add", "--local", "--default", "--force", "elsewhere", os.environ[REMOTE])
    dvc(root, "config", "--local", "cache.dir", str(cache_folder(ROOT)))


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
    with suppress(CommandError):  # git locks one while it makes it, and prunes none such
        git("worktree", "unlock", str(root))
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
        raise CommandError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
