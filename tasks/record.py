"""The lineage record of a run: what anyone needs to say what made its model, and to make it again.

It is written while the run's folder is as the run left it, and kept as the artifact folder `lineage/` of the pipeline's
MLflow run; flows/lineage.py and flows/reproduce.py read nothing else, so that they work in a fresh checkout and after
the folder has changed.

    lineage/record.json         git commit, files that were not committed, data files with md5 and rows, the base model,
                                the run of each step, the md5 of the export, and what does not fit together (`faults`)
    lineage/dvc.lock            what made what, by content; also params.yaml, dvc.yaml, requirements.lock, metrics/
    lineage/uncommitted.patch   the difference to the commit, where there is one
"""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from glm.config import EMBEDDED, Params
from glm.errors import InputError
from tasks import STEPS, programs, steps_to
from tasks.inputs import known_hash
from tasks.lineage import content_hash, files_of, stage_entry, stage_params
from tasks.tracking import create_parent, open_store, store_uri, warn

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "lineage"
COPIES = ("dvc.yaml", "params.yaml", "requirements.lock")
EXPORT = "models/export"
MAX_PATCH_BYTES = 10_000_000
ELSEWHERE = (":!dvc.lock", ":!params.yaml")  # kept as they are, by content


def write_record(
    client: "MlflowClient", run_id: str, params: Params, ours: Sequence[str] = (), until: str | None = None
) -> dict[str, Any]:
    """Write the record of the finished run in the current folder to the MLflow run `run_id`, and return it.

    `ours` are paths that a flow changed itself, such as data that a retraining brought in: they are recorded by content
    and do not count as uncommitted. Of a run that ended with the step `until` nothing of later steps is recorded, for
    what lies here of them is an earlier run's.
    """
    with tempfile.TemporaryDirectory() as temporary:
        patch = uncommitted_patch(params.data.dataset_dir)
        record = make_record(params, patch, ours, until)
        (Path(temporary) / "record.json").write_text(json.dumps(record, ensure_ascii=False, indent=2))
        if record["patch"]:
            (Path(temporary) / "uncommitted.patch").write_bytes(patch)
        if lock := read_lock(until=until):
            with (Path(temporary) / "dvc.lock").open("w", encoding="utf-8") as file:
                YAML().dump({"schema": "2.0", "stages": lock}, file)
        client.log_artifacts(run_id, temporary, FOLDER)
    for path in filter(os.path.exists, COPIES):
        client.log_artifact(run_id, path, FOLDER)
    for step in programs(params.algorithm, steps_to(until)):
        if os.path.exists(path := f"metrics/{step}.json"):
            client.log_artifact(run_id, path, f"{FOLDER}/metrics")
    client.set_tag(run_id, "glmflow.inputs", record["inputs"])
    client.set_tag(run_id, "glmflow.uncommitted", ", ".join(record["uncommitted"])[:5000])
    return record


def make_record(params: Params, patch: bytes, ours: Sequence[str], until: str | None) -> dict[str, Any]:
    """The content of record.json."""
    steps = steps_to(until)
    names = programs(params.algorithm, steps)  # what an earlier algorithm left behind is none of this run's
    uncommitted = uncommitted_files(params.data.dataset_dir, ours)
    faults = inconsistencies(read_lock(until=until), steps)
    if len(patch) > MAX_PATCH_BYTES:
        faults.append(f"the uncommitted changes are {len(patch)} bytes, too many to be kept: commit them")
    base = {"path": params.model.path, "revision": params.model.revision}
    if params.model.path != EMBEDDED:
        base |= _read(Path("models/base/source.json"))
    return {
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "until": until,
        "commit": _git("rev-parse", "HEAD").strip(),
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD").strip(),
        "uncommitted": uncommitted,
        "patch": 0 < len(patch) <= MAX_PATCH_BYTES,
        "inputs": inputs_hash(params),
        "data": {"folder": params.data.dataset_dir, "files": files_of(params.data.dataset_dir)},
        "sources": _read(Path("prepared/raw/sources.json")),
        "rows": _read(Path("reports/preprocess/report.json")),
        "base": base,
        "runs": {name: _read(path) for name in names if (path := Path("runs", f"{name}.json")).exists()},
        "export": known_hash(Path(EXPORT)) if until is None and os.path.exists(EXPORT) else None,
        "faults": faults,
    }


def read_record(client: "MlflowClient", run_id: str) -> dict[str, Any]:
    """The record of a pipeline's run.

    Raises:
        InputError: the run has none.
    """
    from mlflow.exceptions import MlflowException

    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(client.download_artifacts(run_id, f"{FOLDER}/record.json", temporary))
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return record
    except (MlflowException, OSError) as error:
        raise InputError(
            f"run {run_id}: no lineage was recorded with it ({error}); finished flows and `glmflow register` record it"
        ) from None


def inputs_hash(params: Params) -> str:
    """One hash of all that the pipeline starts from: data, the code of each step, the parameters that steps use.

    What the steps hand each other does not count, nor do the bounds of the gate: equal hashes mean equal results.
    """
    entries = {step: stage_entry(step, params.algorithm) for step in STEPS}
    made = {out for entry in entries.values() for out in [*entry.outs, *entry.metrics, *entry.plots]}
    sources = sorted({dep for entry in entries.values() for dep in entry.deps} - made)
    content = {
        "sources": {path: content_hash(path) for path in sources},
        "steps": {step: [entry.deps, stage_params(params, entry)] for step, entry in entries.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_lock(path: str | Path = "dvc.lock", until: str | None = None) -> dict[str, Any]:
    """The stages of a dvc.lock by name, those after the step `until` left out; empty without the file."""
    if not Path(path).exists():
        return {}
    stages: dict[str, Any] = YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))["stages"]
    later = set(STEPS) - set(steps_to(until))
    return {name: entry for name, entry in stages.items() if name not in later}


def inconsistencies(lock: dict[str, Any], steps: Sequence[str] = STEPS) -> list[str]:
    """Where dvc.lock is not what the folder holds, or its stages do not fit together; empty for a sound lineage."""
    if not lock:
        return ["no dvc.lock: the steps were not run by DVC"]
    faults = [f"{step}: not in dvc.lock" for step in steps if step not in lock]
    made = {out["path"]: (stage, out["md5"]) for stage, entry in lock.items() for out in entry.get("outs", [])}
    for stage, entry in lock.items():
        for dep in entry.get("deps", []):
            path, md5 = dep["path"], dep["md5"]
            if path in made:
                if made[path][1] != md5:
                    faults.append(f"{stage}: was run on another {path} than {made[path][0]} made since")
            elif not os.path.exists(path):
                faults.append(f"{stage}: {path} is gone since")
            elif content_hash(path) != md5:
                faults.append(f"{stage}: {path} has changed since")
    if EXPORT in made and os.path.exists(EXPORT) and known_hash(Path(EXPORT)) != made[EXPORT][1]:
        faults.append(f"{EXPORT} is not the one in dvc.lock")
    return faults


def uncommitted_files(dataset_dir: str, ours: Sequence[str] = ()) -> list[str]:
    """Files that differ from the commit, or are new to it; not new files of data, which are kept by content."""
    return [name for state, name in _status(ours) if not (state == "??" and Path(name).is_relative_to(dataset_dir))]


def uncommitted_patch(dataset_dir: str) -> bytes:
    """By what `git apply` makes of the commit what lies here, new files but for data included; b"" for no changes."""
    if not uncommitted_files(dataset_dir):
        return b""
    new = [name for state, name in _status() if state == "??" and not Path(name).is_relative_to(dataset_dir)]
    with tempfile.TemporaryDirectory() as temporary:
        index = {"GIT_INDEX_FILE": str(Path(temporary) / "index")}  # the user's own stays as it is
        _git("read-tree", "HEAD", **index)
        _git("add", "--update", "--", ".", *ELSEWHERE, **index)
        if new:
            _git("add", "--", *new, **index)
        return _git_bytes("diff", "--cached", "--binary", "HEAD", **index)


def keep_record(params: Params, version: str, run_id: str | None, ours: Sequence[str] = ()) -> dict[str, Any] | None:
    """Record the run in the current folder and tie the registered version to it. None: the store failed, which is said.

    Args:
        version: of `promote.model_name`.
        run_id: the pipeline's run; None: a run of its own is made for the record.
        ours: see `write_record`.
    """
    try:
        client, experiment_id = open_store(params.tracking.experiment)
        if run_id is None:
            run_id = create_parent(client, experiment_id, params, "register", {})
            client.set_terminated(run_id)
        record = write_record(client, run_id, params, ours)
        attach(client, params.promote.model_name, version, run_id, record)
        return record
    except Exception as error:  # whatever a store, a driver or a network may raise
        warn(store_uri(), f"version {version} has no lineage, so that no gate will pass it: {error}")
        return None


def keep_run_record(params: Params, run_id: str | None, until: str) -> None:
    """Record the run in the current folder that ended with the step `until`; a store that fails is told."""
    if run_id is None:
        return
    try:
        client, _ = open_store(params.tracking.experiment)
        write_record(client, run_id, params, until=until)
    except Exception as error:  # whatever a store, a driver or a network may raise
        warn(store_uri(), f"the run {run_id} has no lineage: {error}")


def attach(client: "MlflowClient", name: str, version: str, run_id: str, record: dict[str, Any]) -> None:
    """Let a registered version point to the run that holds its record.

    A version made by several equal runs keeps the one without uncommitted changes and faults.
    """
    tags = client.get_model_version(name, version).tags
    sound = not record["uncommitted"] and not record["faults"]
    if "glmflow.run.pipeline" in tags and tags.get("glmflow.lineage") == "sound" and not sound:
        return
    values = {
        "glmflow.run.pipeline": run_id,
        "glmflow.inputs": record["inputs"],
        "glmflow.commit": record["commit"],
        "glmflow.lineage": "sound" if sound else "; ".join([*_uncommitted(record), *record["faults"]])[:5000],
    }
    for key, value in values.items():
        client.set_model_version_tag(name, version, key, value)


def _uncommitted(record: dict[str, Any]) -> list[str]:
    return [f"uncommitted: {', '.join(record['uncommitted'])}"] if record["uncommitted"] else []


def _status(ours: Sequence[str] = ()) -> list[tuple[str, str]]:
    excluded = [*ELSEWHERE, *(f":!{path}" for path in ours)]
    with suppress(OSError, subprocess.CalledProcessError):
        text = _git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", ".", *excluded)
        return [(line[:2], line[3:]) for line in text.split("\0") if line]
    return []


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _git(*arguments: str, **environment: str) -> str:
    return _git_bytes(*arguments, **environment).decode()


def _git_bytes(*arguments: str, **environment: str) -> bytes:
    env = os.environ | environment
    return subprocess.run(["git", *arguments], check=True, capture_output=True, env=env).stdout
