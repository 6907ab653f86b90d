"""Lineage: which data, code, parameters, machine and earlier models made a model, out of what was recorded with it.

Everything comes from the MLflow store: the record that the pipeline's run keeps (tasks/record.py), and the steps' own
runs. Nothing is read from the present folder, except for the hash of a path that is asked about.
"""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import load_params
from glm.errors import InputError
from tasks.lineage import content_hash
from tasks.record import FOLDER, read_lock, read_record
from tasks.registered import find_version, version_of_hash
from tasks.tracking import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

KINDS = {"prepared": "rows", "models": "model", "reports": "report"}  # by the folder of a stage's output
MACHINE = ("machine.host", "machine.cpu", "machine.threads", "machine.gpu", "machine.python", "machine.torch")


@dataclass(frozen=True)
class Node:
    """One thing in the chain: what kind it is, its content hash, what it was made from, and facts about it."""

    name: str
    kind: str  # data, rows, tokens, model, code
    hash: str
    made_from: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """All of it: what was asked about, the facts of the run, and the nodes, each after what it was made from."""

    of: str
    run_id: str
    facts: dict[str, Any]
    nodes: list[Node]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def trace(target: str) -> Lineage:
    """The lineage of models:/NAME@ALIAS, models:/NAME/VERSION, an MLflow run, or a file or folder that a run made.

    Raises:
        InputError: nothing of that name is known, or nothing was recorded with it.
    """
    client, experiment_id = open_store(load_params().tracking.experiment)
    run_id, facts = find_run(client, experiment_id, target)
    record = read_record(client, run_id)
    run = client.get_run(run_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(client.download_artifacts(run_id, FOLDER, temporary))
        lock = read_lock(folder / "dvc.lock")
    facts |= {
        "run": run.info.run_name,
        "commit": record["commit"],
        "uncommitted": record["uncommitted"],
        "faults": record["faults"],
        "requirements_lock_md5": run.data.tags.get("glmflow.requirements_lock_md5"),
        "parameters": dict(run.data.params),
        "metrics": {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")},
    }
    return Lineage(target, run_id, facts, [*data_nodes(record), *stage_nodes(client, lock, record)])


def find_run(client: "MlflowClient", experiment_id: str, target: str) -> tuple[str, dict[str, Any]]:
    """The pipeline's run behind a model URI, a run or a path, and the facts of the version if there is one."""
    from mlflow.exceptions import MlflowException

    whole = Path(target).resolve() in (Path.cwd(), *Path.cwd().parents)  # of the project, which nobody made
    if target.startswith("models:/"):
        version = find_version(client, target)
        run_id = version.tags.get("glmflow.run.pipeline")
        if run_id is None:
            raise InputError(f"{target}: no lineage was recorded with version {version.version}")
        words = {key: value for key, value in version.tags.items() if key.startswith(("promoted.", "gate."))}
        return run_id, {"version": f"{version.name} version {version.version}", "aliases": version.aliases, **words}
    if target and not whole and Path(target).exists():
        digest = content_hash(target)
        if version := version_of_hash(client, digest):
            return find_run(client, experiment_id, f"models:/{version.name}/{version.version}")
        path = Path(target).as_posix().rstrip("/")
        found = client.search_runs([experiment_id], f"tags.`dvc.out.{path}` = '{digest}'", max_results=1)
        if not found:
            raise InputError(f"{target}: no run in the store made this content ({digest})")
        return found[0].data.tags.get("mlflow.parentRunId", found[0].info.run_id), {}
    try:
        run = client.get_run(target)
    except MlflowException:
        raise InputError(
            f"{target!r}: neither models:/NAME@ALIAS, models:/NAME/VERSION, a run of the store, nor a path here"
        ) from None
    return run.data.tags.get("mlflow.parentRunId", target), {}


def data_nodes(record: dict[str, Any]) -> list[Node]:
    """A node for each dataset that was used: its files with their hashes, and the rows of each use."""
    nodes = []
    for name, source in record["sources"].items():
        rows = {
            use: {key: counts[name][key] for key in ("read", "kept", "train", "dev", "test")}
            for use, counts in record["rows"].items()
            if name in counts
        }
        facts = {"source": source["entry"], "files": source["sha256"], "rows": rows}
        nodes.append(Node(name, "data", _short_of(source["sha256"]), [], facts))
    return nodes


def stage_nodes(client: "MlflowClient", lock: dict[str, Any], record: dict[str, Any]) -> list[Node]:
    """A node for each folder that a stage made, in the order of dvc.lock's own dependencies."""
    made = {out["path"] for entry in lock.values() for out in entry.get("outs", [])}
    nodes: list[Node] = []
    waiting = dict(lock)
    while waiting:
        stage, entry = next(
            (stage, entry)
            for stage, entry in waiting.items()
            if not any(
                dep["path"] in {out["path"] for out in other.get("outs", [])}
                for dep in entry.get("deps", [])
                for other in waiting.values()
                if other is not entry
            )
        )
        del waiting[stage]
        nodes += nodes_of(client, stage, entry, made, record)
    return nodes


def nodes_of(
    client: "MlflowClient", stage: str, entry: dict[str, Any], made: set[str], record: dict[str, Any]
) -> list[Node]:
    """The nodes of one stage: what it made, and the tokenised rows that it trained on."""
    program = entry["cmd"].rpartition(".")[2]
    facts = step_facts(client, record["runs"].get(program, {}).get("run_id"))
    deps = entry.get("deps", [])
    inputs = [dep["path"] for dep in deps if dep["path"] in made and not dep["path"].startswith(("metrics/", "runs/"))]
    if stage == "fetch":
        inputs += list(record["sources"])
    tokens = [
        Node(f"{stage}: {name} tokenised", "tokens", key, ["prepared/rows"], {"rows": rows})
        for name, key, rows in facts.pop("tokenised", [])
    ]
    if tokens:
        inputs = [path for path in inputs if path != "prepared/rows"] + [node.name for node in tokens]
    code = {
        dep["path"]: dep["md5"] for dep in deps if dep["path"] not in made and dep["path"] != record["data"]["folder"]
    }
    parameters = {name: value for values in entry.get("params", {}).values() for name, value in values.items()}
    if stage == "base":
        facts["model"] = {key: record["base"].get(key) for key in ("path", "revision", "files")}
    facts |= {"stage": stage, "parameters": parameters, "code": code}
    nodes = list(tokens)
    for out in entry.get("outs", []):
        folder = out["path"].partition("/")[0]
        if folder in KINDS:
            nodes.append(Node(out["path"], KINDS[folder], out["md5"], inputs, facts))
    return nodes


def step_facts(client: "MlflowClient", run_id: str | None) -> dict[str, Any]:
    """What a step's own run says: metrics, machine, commit, and the tokenised rows that it read."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id) if run_id else None
    except MlflowException:
        run = None  # DVC restored the output, and the store that knew its run is another
    if run is None:
        return {"run": run_id}
    tokenised = []
    for item in run.inputs.dataset_inputs:
        tags = {tag.key: tag.value for tag in item.tags}
        if "tokenised" in tags:
            name = f"{item.dataset.name}/{tags['mlflow.data.context']}"
            tokenised.append((name, tags["tokenised"], int(tags["rows"])))
    return {
        "run": run_id,
        "commit": run.data.tags.get("mlflow.source.git.commit"),
        "machine": {key: run.data.tags[key] for key in MACHINE if key in run.data.tags},
        "metrics": {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")},
        "tokenised": tokenised,
    }


def _short_of(files: dict[str, str]) -> str:
    return next(iter(files.values())) if len(files) == 1 else f"{len(files)} files"
