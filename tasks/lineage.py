"""What a run was made from: its entry in dvc.yaml, content hashes as DVC computes them, the git state, the machine."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from glm.config import Params
from glm.errors import InputError


@dataclass(frozen=True)
class StageEntry:
    """The paths and parameter names that dvc.yaml lists for one stage."""

    deps: list[str]
    params: list[str]
    outs: list[str]
    metrics: list[str]
    plots: list[str]


def stage_entry(step: str, algorithm: str, path: str | Path = "dvc.yaml") -> StageEntry:
    """Read one stage of dvc.yaml, as it is with this `algorithm` in params.yaml.

    Like DVC, it puts values of the params.yaml beside it in the place of ${their.names}.

    Raises:
        InputError: there is no such file, or no such stage in it.
    """
    yaml = YAML(typ="safe")
    try:
        text = Path(path).read_text(encoding="utf-8").replace("${algorithm}", algorithm)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; start a step in the project's root") from None
    if "${" in text:
        values = flatten(yaml.load(Path(path).with_name("params.yaml").read_text(encoding="utf-8")))
        text = re.sub(r"\$\{([\w.]+)\}", lambda found: str(values[found[1]]), text)
    stages = yaml.load(text)["stages"]
    if step not in stages:
        raise InputError(f"{path}: no stage {step!r}; it has {', '.join(stages)}")
    return StageEntry(
        *(
            [next(iter(item)) if isinstance(item, dict) else item for item in stages[step].get(key, [])]
            for key in ("deps", "params", "outs", "metrics", "plots")
        )
    )


def content_hash(path: str | Path) -> str:
    """The hash by which DVC knows a file (md5 of its bytes) or a folder (md5 of its list of files, with '.dir')."""
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    entries = [{"md5": md5, "relpath": name} for name, md5 in files_of(path).items()]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def files_of(folder: str | Path) -> dict[str, str]:
    """The md5 of every file below a folder by its relative path, in the order in which DVC lists them."""
    folder = Path(folder)
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {name: content_hash(folder / name) for name in sorted(file.relative_to(folder).as_posix() for file in files)}


def hashes_in_lock(path: str | Path = "dvc.lock") -> dict[str, str]:
    """The hash of every output that dvc.lock knows; empty without a lock file."""
    if not Path(path).exists():
        return {}
    stages = YAML(typ="safe").load(Path(path).read_text(encoding="utf-8")).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}


def input_hashes(entry: StageEntry) -> dict[str, str]:
    """The hash of each existing dependency of a stage.

    Below DVC, which has just compared them with dvc.lock, the outputs of other stages are not read again: they may be
    many gigabytes.
    """
    known = hashes_in_lock() if "DVC_ROOT" in os.environ else {}
    return {path: known.get(path) or content_hash(path) for path in entry.deps if Path(path).exists()}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def stage_params(params: Params, entry: StageEntry) -> dict[str, Any]:
    """The parameters that a stage depends on, by dotted name."""
    return {
        name: value
        for name, value in flatten(params.model_dump()).items()
        if any(name == used or name.startswith(f"{used}.") for used in entry.params)
    }


def git_tags() -> dict[str, str]:
    """Commit, branch and whether tracked files differ from the commit; empty outside git.

    params.yaml and dvc.lock do not count as a difference: runs record their content, and every run writes the latter.
    """
    try:
        commit, branch = (_git("rev-parse", "HEAD"), _git("rev-parse", "--abbrev-ref", "HEAD"))
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock", ":!params.yaml")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch,
        "glmflow.git_dirty": str(bool(changed)).lower(),
    }


def lock_tags() -> dict[str, str]:
    """The hash of requirements.lock, where there is one."""
    lock = Path("requirements.lock")
    return {"glmflow.requirements_lock_md5": content_hash(lock)} if lock.exists() else {}


def thread_number() -> int:
    """OMP_NUM_THREADS if set, else the physical cores this process may use (affinity and container limits counted)."""
    if os.environ.get("OMP_NUM_THREADS"):
        return int(os.environ["OMP_NUM_THREADS"])
    from joblib import cpu_count  # brings numpy

    return cpu_count(only_physical_cores=True)


def machine_tags() -> dict[str, str]:
    """Host, processor, memory, Python; torch and GPU names where torch has been loaded."""
    tags = {
        "machine.host": platform.node(),
        "machine.cpu": f"{_cpu_name()} x {os.cpu_count()}",
        "machine.threads": str(thread_number()),
        "machine.processes": os.environ.get("WORLD_SIZE", "1"),
        "machine.memory_gb": f"{psutil.virtual_memory().total / 1e9:.1f}",
        "machine.python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        tags |= {"machine.torch": torch.__version__, "machine.gpu": ", ".join(gpus) or "none"}
    return tags


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
