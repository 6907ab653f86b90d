"""`make deploy` and what follows from it: runs by name, in workspaces; cancelling; schedules that really fire."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import guard
from flows.server import free_port
from glm.config import load_params
from tasks import programs
from tests.pipeline.conftest import Project, last_run, query


@pytest.fixture
def deployed(project: Project) -> Iterator[Project]:
    """A project after `make deploy`, with a server and worker of its own."""
    del project.env["PREFECT_API_URL"]
    project.env["SLEEP_sft"] = "60"  # what the worker passes on
    deploy(project, "start", "--port", str(free_port()))
    yield project
    deploy(project, "stop")


def deploy(project: Project, *words: str) -> str:
    return project.command(sys.executable, "-m", "flows.deploy", *words).stdout


def api(project: Project) -> str:
    return json.loads((project.root / ".prefect" / "server.json").read_text())["url"]


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.5)


def test_deployment(deployed: Project) -> None:
    url = api(deployed)
    server, worker = ((deployed.root / ".prefect" / f"{name}.json").read_text() for name in ("server", "worker"))

    # a second deploy changes nothing
    assert url.removesuffix("/api") in deploy(deployed, "start")
    assert server == (deployed.root / ".prefect" / "server.json").read_text()
    assert worker == (deployed.root / ".prefect" / "worker.json").read_text()
    deployments = query(url, "deployments/filter", {})
    assert len(deployments) == 3
    by_flow = {one["entrypoint"].rpartition(":")[2]: one for one in deployments}
    deployment, retraining = by_flow["rlhf_pipeline"], by_flow["retrain"]
    assert retraining["name"] == "weekly" and not retraining["schedules"][0]["active"]
    assert deployment["name"] == "default" and deployment["work_pool_name"] == "local"
    (schedule,) = deployment["schedules"]
    assert schedule["schedule"]["cron"] == "0 3 * * 0" and not schedule["active"]

    # a run by name, by the command of the README, without any variable set
    run = ["prefect", "deployment", "run", "rlhf-pipeline/default", "-p"]
    deployed.command(*run, 'overrides={"ppo.learning_rate": 2e-5}')
    deployed.wait_for("sft", seconds=90)
    (workspace,) = (path for path in (deployed.root / ".worktrees").iterdir() if path.is_dir())
    assert load_params(workspace / "params.yaml").ppo.learning_rate == 2e-5

    # cancelled in the middle of a stage
    flow_run = last_run(url)
    deployed.command("prefect", "flow-run", "cancel", flow_run["id"])
    wait_until(lambda: last_run(url)["state"]["type"] == "CANCELLED", 60)
    wait_until(lambda: not any("dvc" in process.cmdline() for process in deployed.processes()), 30)
    wait_until(lambda: list((deployed.root / ".worktrees").iterdir()) == [], 30)
    assert deployed.git("status", "--porcelain") == ""
    assert deployed.executed() == ["fetch", "preprocess", "base", "sft"]

    # wrong names fail at once and say so
    deployed.command(*run, 'overrides={"ppo.learning_rat": 2e-5}')
    wait_until(lambda: last_run(url)["state"]["type"] == "FAILED", 60)
    assert "did you mean ppo.learning_rate?" in last_run(url)["state"]["message"]
    assert deployed.executed() == []

    # stopping takes the run at work along
    deployed.command(*run, "overrides={}")
    deployed.wait_for("sft", seconds=90)
    assert "watcher, worker, server" in deploy(deployed, "stop")
    deployed.assert_nothing_runs()
    assert "Nothing" in deploy(deployed, "stop")
    assert not (deployed.root / ".prefect" / "profiles.toml").exists()

    # started again, it knows what happened; a run that ends well is kept as an experiment
    del deployed.env["SLEEP_sft"]
    deployed.executed()
    deploy(deployed, "start", "--port", url.split(":")[2].removesuffix("/api"))
    assert last_run(url)["state"]["type"] == "CANCELLED"
    deployed.command(*run, 'overrides={"ppo.learning_rate": 2e-5}', "--watch")
    assert deployed.executed() == list(programs("ppo")[3:])
    assert deployed.git("status", "--porcelain") == ""
    assert deployed.dvc("exp", "list", "--name-only").split() == [last_run(url)["name"]]


def test_a_port_in_use_is_said(project: Project, prefect_api: str) -> None:
    del project.env["PREFECT_API_URL"]
    port = prefect_api.rsplit(":", 1)[1].removesuffix("/api")
    done = project.command(sys.executable, "-m", "flows.deploy", "start", "--port", port, check=False)
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
    project.assert_nothing_runs()


CRON = """
from prefect import flow

@flow(name="every-minute")
def every_minute():
    pass

if __name__ == "__main__":
    every_minute.serve(name="cron", cron="* * * * *")
"""


def test_a_cron_schedule_fires(tmp_path: Path, prefect_api: str) -> None:
    """With SQLAlchemy 2.1 it silently does not; the lock and pyproject.toml keep 2.0."""
    (tmp_path / "served.py").write_text(CRON)
    env = os.environ | {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(tmp_path)}
    finished = {
        "flows": {"name": {"any_": ["every-minute"]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }
    command = [sys.executable, "served.py"]
    with (
        (tmp_path / "log").open("w") as log,
        guard.running(command, cwd=tmp_path, env=env, stdout=log) as process,
    ):
        wait_until(lambda: query(prefect_api, "flow_runs/filter", finished) != [], 150)
        process.terminate()
    assert query(prefect_api, "flow_runs/filter", finished)[0]["auto_scheduled"]
