"""MLflow: where the store is, and the run of a whole pipeline run, the parent of its steps' runs (step_run.py).

The store is MLFLOW_TRACKING_URI, else `mlruns/mlflow.db` of the main checkout, from a git worktree and from a temporary
DVC experiment too. MLflow itself is imported when the store is opened.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from glm.config import Params
from tasks.lineage import flatten, git_tags, lock_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROCESS_TAG = "glmflow.process"  # of a run: host, number and start of the process that is to end it
KEY = "glmflow.key"  # tag: what a run stands for, where it is opened again by it
PARENT_RUN = "GLMFLOW_PARENT_RUN_ID"  # environment variable by which a flow hands its run to the stages

SETTINGS = {  # MLflow's own defaults wait minutes for a dead server
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def main_checkout() -> Path:
    """The folder of the main checkout: of the repository that DVC works on, also from its worktrees; else the cwd."""
    root = Path(os.environ.get("DVC_ROOT") or ".").resolve()
    command = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    try:
        common = Path(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return root
    return common.parent if common.name == ".git" else root


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else the sqlite file under mlruns/ of the main checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main_checkout()}/mlruns/mlflow.db"


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Keep other processes of this machine out of what must be done once: making the tables, an experiment, a parent.

    A kernel lock, so that a killed process leaves nothing behind.
    """
    if uri.startswith("sqlite:///"):
        path = Path(f"{uri.removeprefix('sqlite:///')}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        path = Path(tempfile.gettempdir(), f"glmflow-{os.getuid()}-{hashlib.md5(uri.encode()).hexdigest()}.lock")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_store(experiment: str, uri: str | None = None) -> tuple["MlflowClient", str]:
    """A client of the store and the experiment's id. The first caller makes the database and the experiment.

    The artifacts of an sqlite store lie beside it in `artifacts/`; a server says where its own go.

    Raises:
        MlflowException: the store cannot be reached, does not want us, or its address is wrong.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    uri = uri or store_uri()
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not uri.startswith("http"):
        from mlflow.store.db import utils

        logging.getLogger(utils.__name__).setLevel(logging.ERROR)  # a warning a try
        utils.MAX_RETRY_COUNT = 4  # tries to reach a database; MLflow's ten take 100 s
    mlflow.set_tracking_uri(uri)
    try:
        with store_lock(uri):  # four first users at once: three would crash in the migrations
            client = mlflow.MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found:
                return client, found.experiment_id
            database = Path(uri.removeprefix("sqlite:///")).absolute()
            artifacts = str(database.parent / "artifacts") if uri.startswith("sqlite:///") else None
            return client, client.create_experiment(experiment, artifact_location=artifacts)
    except MlflowException:
        raise
    except Exception as error:  # of a driver, or of whoever reads the address
        said = str(error).splitlines() or [type(error).__name__]
        raise MlflowException(f"the store cannot be opened: {said[0]}") from error


def start_parent_run(
    params: Params, run_name: str | None = None, tags: Mapping[str, str] | None = None, key: str | None = None
) -> str | None:
    """Open the run that stands for a whole pipeline run and return its id; None if the store fails, which is said.

    With a `key`, a run that was opened with the same key before is opened again.

    It holds all parameters, the git commit, params.yaml and requirements.lock; its children are the steps. Give its id
    to the stages in GLMFLOW_PARENT_RUN_ID and close it with `finish_parent_run`.
    """
    try:
        client, experiment_id = open_store(params.tracking.experiment)
        tidy(client, experiment_id)
        tags = dict(tags or {}) | ({KEY: key} if key else {})
        found = client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1) if key else []
        if not found:
            return create_parent(client, experiment_id, params, run_name, tags)
        run_id: str = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, PROCESS_TAG, process_key(psutil.Process()))
        return run_id
    except Exception as error:  # whatever a store, a driver or a network may raise
        warn(store_uri(), f"the pipeline goes on without a run of its own: {error}")
        return None


def parent_of(run_id: str | None) -> str | None:
    """The pipeline's run above a step's; None where the store does not know."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        parent: str | None = MlflowClient(store_uri()).get_run(run_id).data.tags.get("mlflow.parentRunId")
        return parent
    except MlflowException:
        return None


def finish_parent_run(
    run_id: str | None, status: str, steps: Iterable[str], artifacts: Iterable[str | Path] = ()
) -> None:
    """Close a pipeline's run: link the steps that are done, restored ones included, copy their metrics, keep files.

    Args:
        run_id: from `start_parent_run`; nothing is done for None.
        status: FINISHED, FAILED or KILLED.
        steps: those that succeeded in this run, executed or restored from DVC's cache.
        artifacts: files or folders to keep with the run beside dvc.lock, such as the table of results and the samples.
    """
    if run_id is None:
        return
    import mlflow

    try:
        client = mlflow.MlflowClient(store_uri())
        client.set_terminated(run_id, status)
        link_steps(client, run_id, steps)
        for path in [*artifacts, *filter(os.path.exists, ["dvc.lock"])]:
            client.log_artifact(run_id, str(path))
    except Exception as error:
        warn(store_uri(), f"the pipeline's run {run_id} is not complete: {error}")


def keep_file(run_id: str | None, path: Path) -> None:
    """Keep a copy of a file with a pipeline's run; nothing is done for None."""
    if run_id is None:
        return
    import mlflow

    try:
        mlflow.MlflowClient(store_uri()).log_artifact(run_id, str(path))
    except Exception as error:  # whatever a store, a driver or a network may raise
        warn(store_uri(), f"{path} is not kept with the run: {error}")


def warn(uri: str, text: str) -> None:
    """Say on stderr what went wrong with the store, without the password that its address may hold."""
    print(re.sub(r"//[^/@\s]*@", "//", f"warning: MLflow at {uri}: {text}"), file=sys.stderr)


def store_failure(error: Exception) -> str | None:
    """A line for a person if the store has failed, without the password in its address; None for any other error."""
    known = sys.modules.get("mlflow.exceptions")
    if known is None or not isinstance(error, known.MlflowException):
        return None
    return re.sub(r"//[^/@\s]*@", "//", f"MLflow at {store_uri()}: {str(error).splitlines()[0]}")


def link_steps(client: "MlflowClient", parent_id: str, steps: Iterable[str]) -> None:
    """Tag a parent with the run that made each step's output, and copy the step's metrics as `<step>.<name>`.

    runs/<step>.json is a cached output, so a step restored from DVC's cache names the run that trained it.
    """
    from mlflow.entities import Metric

    known = client.get_run(parent_id).data
    now = int(time.time() * 1000)
    for step in steps:
        made_by = Path("runs", f"{step}.json")
        metrics = Path("metrics", f"{step}.json")
        run_id = json.loads(made_by.read_text())["run_id"] if made_by.exists() else None
        if run_id and known.tags.get(f"glmflow.run.{step}") == run_id:
            continue
        if not run_id and any(name.startswith(f"{step}.") for name in known.metrics):
            continue
        if metrics.exists():
            values = flatten(json.loads(metrics.read_text()))
            client.log_batch(parent_id, metrics=[Metric(f"{step}.{name}", v, now, 0) for name, v in values.items()])
        if run_id:
            client.set_tag(parent_id, f"glmflow.run.{step}", run_id)


def source_tags(program: str) -> dict[str, str]:
    """Who ran what: the tags that MLflow's pages show as user and source, and the process that will end the run."""
    process = psutil.Process()
    return {
        "mlflow.user": process.username(),
        "mlflow.source.name": program,
        "mlflow.source.type": "LOCAL",
        PROCESS_TAG: process_key(process),
    }


def process_key(process: psutil.Process) -> str:
    """A process of some machine, at some time."""
    return f"{socket.gethostname()}:{process.pid}:{process.create_time():.2f}"


def close_killed_runs(client: "MlflowClient", experiment_id: str) -> list[str]:
    """Close, as KILLED, the runs whose process on this machine is gone without doing so. Returns their ids."""
    closed = []
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        host, _, process = run.data.tags.get(PROCESS_TAG, "").partition(":")
        if host == socket.gethostname() and not _is_alive(*process.split(":")):
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(run.info.run_id)
    return closed


def _is_alive(pid: str, created: str) -> bool:
    try:
        process = psutil.Process(int(pid))
        return f"{process.create_time():.2f}" == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tidy(client: "MlflowClient", experiment_id: str) -> None:
    """What every run does when it first reaches the store: see to what earlier ones could not."""
    from tasks.unsent import send_unsent

    try:
        send_unsent(client)
        close_killed_runs(client, experiment_id)
    except Exception as error:  # whatever a store, a driver or a network may raise
        warn(store_uri(), f"what earlier runs left behind stays for the next one: {error}")


def create_parent(
    client: "MlflowClient",
    experiment_id: str,
    params: Params,
    run_name: str | None,
    tags: Mapping[str, str],
    started: float | None = None,
) -> str:
    """Make a pipeline's run and return its id. `started` is in seconds since 1970; None: now."""
    model = params.model.path + (f" at {params.model.revision}" if params.model.revision else "")
    description = (
        f"One run of the RLHF pipeline on `{model}`: SFT on {', '.join(params.data.sft)}, reward model on "
        f"{', '.join(params.data.reward)}, then {params.algorithm.upper()}.\n\nEach step is a run below this one. "
        "A tag `glmflow.run.<step>` names the run that made a step's output: an older one if DVC restored it."
    )
    described = {"mlflow.note.content": description, "glmflow.step": "pipeline"}
    all_tags = source_tags("rlhf-pipeline") | git_tags() | lock_tags() | described | dict(tags)
    run = client.create_run(experiment_id, int((started or time.time()) * 1000), all_tags, run_name=run_name)
    run_id = run.info.run_id
    log_params(client, run_id, flatten(params.model_dump()))
    for path in filter(os.path.exists, ["params.yaml", "requirements.lock"]):
        client.log_artifact(run_id, path)
    return run_id


def log_params(client: "MlflowClient", run_id: str, values: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(name, str(value)) for name, value in values.items()]
    for start in range(0, len(entries), 100):  # the store's limit for one batch
        client.log_batch(run_id, params=entries[start : start + 100])
