"""Prefect's server and worker on this machine, and MLflow's pages: `make deploy`, `make stop`, `make ui`.

Everything listens on 127.0.0.1 and lives under .prefect/. The server's address is written into a profile there, which
prefect.toml points to, so that `prefect` in this folder finds it.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from prefect import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Crashed

from flows import ROOT
from flows.data_events import remember
from flows.dvc_stage import stage_environment
from flows.server import wait_until_up
from glm.config import load_params
from glm.errors import InputError
from glm.files import write_json, write_text

HOME = ROOT / ".prefect"
PROFILE = HOME / "profiles.toml"
POOL = "local"
PORT = 4200
ACTIVE = FlowRunFilter(
    state=FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    )
)
STOP_SECONDS = 40  # a worker takes a run down with it, and a stage has ten seconds to close its books


def start(port: int) -> None:
    """Start server, worker and the watcher of data/ if they are not running, deploy, and say what to do next."""
    url = ensure_server(port)
    prefect(url, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    prefect(url, "--no-prompt", "deploy", "--all")
    if not find("worker"):
        close_dead_runs(url)
        launch("worker", ["prefect", "worker", "start", "--pool", POOL], url)
    if not find("watcher"):
        remember(ROOT / load_params(ROOT / "params.yaml").data.dataset_dir)
        launch("watcher", ["apps.cli", "data", "watch"], url)
    print(
        f"Prefect's pages: {url.removesuffix('/api')}   (logs: .prefect/server.log, .prefect/worker.log)\n\n"
        "Next, in this folder, with the environment active (. .venv/bin/activate):\n"
        "  prefect deployment run rlhf-pipeline/default -p overrides='{\"ppo.learning_rate\": 2e-5}'\n"
        "  prefect deployment schedule ls rlhf-pipeline/default     its weekly schedule is paused: schedule resume\n"
        "  prefect deployment run retrain/weekly     new data, pipeline, gate; by itself for a new file in data/\n"
        "  make stop"
    )


def stop() -> None:
    """Cancel the run at work, stop the worker, then the server: a worker without a server waits for it."""
    if find("worker") and find("server"):
        cancel_runs(server_url())
    stopped = [name for name in ("watcher", "worker", "server") if end(name)]
    PROFILE.unlink(missing_ok=True)
    print(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing was running.")


def ensure_server(port: int = PORT) -> str:
    """The API of this project's server, which is started if it is not running.

    Raises:
        InputError: another program has the port.
    """
    if find("server"):
        return server_url()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise InputError(f"port {port} is taken by another program: choose another, make deploy PORT={port + 1}")
    url = f"http://127.0.0.1:{port}/api"
    process = launch("server", ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], url)
    wait_until_up(url, process, log_file("server"))
    write_text(PROFILE, f'active = "local"\n\n[profiles.local]\nPREFECT_API_URL = "{url}"\n')
    return url


def server_url() -> str:
    """The API of the recorded server."""
    return str(json.loads(record_file("server").read_text())["url"])


def cancel_runs(url: str) -> None:
    """Cancel what the worker is at, and wait for its end: a worker that is stopped kills its runs outright.

    Such a run would stay "Running" for ever, and keep the deployment's one slot for minutes.
    """
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    deadline = time.monotonic() + STOP_SECONDS
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        while runs := client.read_flow_runs(flow_run_filter=ACTIVE, work_pool_filter=pool):
            if time.monotonic() > deadline:
                return
            for run in runs:
                if run.state_type != StateType.CANCELLING:
                    client.set_flow_run_state(run.id, Cancelling())
            time.sleep(1)


def close_dead_runs(url: str) -> list[str]:
    """Mark as Crashed what a worker of this machine had begun and no process is at: killed together with its worker.

    Such a run would stay "Running", and keep the deployment's one slot until its lease ends, some six minutes later.
    Returns the names of the runs.
    """
    alive = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            alive.add(process.environ().get("PREFECT__FLOW_RUN_ID"))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    closed = []
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=ACTIVE, work_pool_filter=pool):
            if str(run.id) not in alive:
                client.set_flow_run_state(run.id, Crashed(message="Its process was killed."), force=True)
                closed.append(run.name)
    return closed


def prefect(url: str, *arguments: str) -> None:
    """Run a command of Prefect against the server at `url`; its output is shown only if it fails."""
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(url), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"prefect {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def launch(name: str, arguments: list[str], url: str) -> subprocess.Popen[str]:
    """Start a Python module with its arguments in the background and record its process."""
    HOME.mkdir(exist_ok=True)
    with log_file(name).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment(url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    started = psutil.Process(process.pid).create_time()
    write_json(record_file(name), {"pid": process.pid, "started": started, "url": url})
    return process


def find(name: str) -> psutil.Process | None:
    """The recorded process, if it still runs; an equal number given to a later process does not count."""
    if not record_file(name).exists():
        return None
    record = json.loads(record_file(name).read_text())
    try:
        process = psutil.Process(record["pid"])
        alive = process.create_time() == record["started"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def end(name: str) -> bool:
    """Stop a recorded process and what it started, first politely. False: it was not running."""
    process = find(name)
    record_file(name).unlink(missing_ok=True)
    if process is None:
        return False
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for straggler in left:
        straggler.kill()
    return True


def pages(port: int) -> None:
    """Serve MLflow's pages of the project's store in the foreground, in place of this process."""
    from tasks.tracking import open_store, store_uri

    store = store_uri()
    if store.startswith("http"):
        print(f"The runs are on the tracking server: {store}")
        return
    open_store(load_params().tracking.experiment)  # makes the database if there is none yet
    print(f"MLflow's pages: http://127.0.0.1:{port}   (Ctrl-C ends them)", flush=True)
    arguments = ["--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else a dozen processes and 2 GB
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", "server", *arguments], env)


def environment(url: str) -> dict[str, str]:
    """Prefect's programs with the API at `url`."""
    return stage_environment() | {"PREFECT_API_URL": url, "PWD": str(ROOT)}  # prefect.yaml mentions PWD


def record_file(name: str) -> Path:
    """Where the process is recorded."""
    return HOME / f"{name}.json"


def log_file(name: str) -> Path:
    """Where its output goes."""
    return HOME / f"{name}.log"


def main() -> int:
    """The command line of the make targets. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.deploy")
    parser.add_argument("action", choices=["start", "stop", "ui"])
    parser.add_argument("--port", type=int, default=PORT)
    arguments = parser.parse_args()
    try:
        if arguments.action == "start":
            start(arguments.port)
        elif arguments.action == "ui":
            pages(arguments.port)
        else:
            stop()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
