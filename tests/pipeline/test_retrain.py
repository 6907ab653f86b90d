"""Retraining: nothing without new data, the gate between challenger and champion, the event, a person's word."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from flows.server import free_port
from tasks import STEPS
from tests.pipeline.conftest import HERE, Project, last_run, query
from tests.pipeline.test_deploy import api, deploy, wait_until

PAIR = {"prompt": [{"role": "user", "content": "写一条评论"}], "chosen": "很好", "rejected": "很坏"}


@pytest.fixture
def operated(project: Project) -> Project:
    """A project with trivial stages that learns from feedback, and a trivial judge."""
    shutil.copy(HERE / "trivial_judge.py", project.root / "tasks" / "judge.py")
    project.set_param("data.reward", "[reviews_pairs]", "[reviews_pairs, feedback]")
    project.commit()
    return project


def test_ctrl_c_stops_a_retraining(operated: Project, prefect_api: str) -> None:
    project = operated
    command = [sys.executable, "-m", "flows.retrain"]
    environment = project.env | {"SLEEP_sft": "120"}
    flow = subprocess.Popen(command, cwd=project.root, env=environment, stderr=subprocess.PIPE, text=True)
    project.wait_for("sft")
    flow.send_signal(signal.SIGINT)
    _, errors = flow.communicate(timeout=60)
    assert flow.returncode == 130
    assert "Nothing is left running" in errors and "Traceback" not in errors
    assert project.processes() == []
    assert last_run(prefect_api, "retrain")["state"]["type"] == "CRASHED"


def retrain(project: Project, *words: str, **env: str) -> str:
    return project.command(sys.executable, "-m", "flows.retrain", *words, **env).stdout.splitlines()[-1]


def give_feedback(project: Project, name: str, answer: str = "很好") -> None:
    row = json.dumps(PAIR | {"id": name, "chosen": answer}, ensure_ascii=False)
    (project.root / "data" / "feedback" / f"{name}.jsonl").write_text(f'{row}\n{{"half a r')


def test_retrain_promotes_refuses_and_rests(operated: Project, prefect_api: str) -> None:
    project = operated
    assert retrain(project) == "Promoted: rlhf-policy version 1 is the champion (before: none)"
    assert len(project.executed()) == len(STEPS)
    assert project.git("status", "--porcelain") == ""

    started = time.monotonic()
    assert retrain(project).startswith("No new data: data, code and parameters are those of the champion, version 1")
    assert time.monotonic() - started < 60  # seconds on an idle machine
    assert project.executed() == []
    assert last_run(prefect_api, "retrain")["state"]["name"] == "No new data"

    give_feedback(project, "monday")
    line = retrain(project, GAIN="-1")
    assert line.startswith("Refused: rlhf-policy version 2: reward, better than champion: -1 [-1, -1], must be low end")
    assert project.executed()[0] == "fetch"
    run = last_run(prefect_api, "retrain")
    assert (run["state"]["type"], run["state"]["name"]) == ("COMPLETED", "Refused")
    artifacts = query(prefect_api, "artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    (table,) = (json.loads(artifact["data"]) for artifact in artifacts if artifact["key"] == "gate")
    assert {row["name"]: row["passed"] for row in table}["reward, better than champion"] is False
    report = (project.root / "reports" / "promotion" / "rlhf-policy-v2.md").read_text()
    assert (
        "version 2: refused" in report and "| reward, better than champion | -1 [-1, -1] | low end > 0 | NO |" in report
    )
    assert retrain(project).startswith("No new data: data, code and parameters are those of the last retraining")

    give_feedback(project, "tuesday")
    line = retrain(project, "-S", "promote.approval=true")
    assert line.startswith("Awaiting approval: rlhf-policy version 3 passed the gate; glmflow promote 3")
    glmflow = [sys.executable, "-m", "apps.cli"]
    assert (
        "version 3 is the champion (before: 1)"
        in project.command(*glmflow, "promote", "--version", "3", "--reason", "read its answers").stdout
    )
    assert "version 1 is the champion again" in project.command(*glmflow, "rollback", "--reason", "swears").stdout
    history = project.command(*glmflow, "champions").stdout
    assert "read its answers" in history and "swears" in history and "gate" in history


@pytest.fixture
def deployed(operated: Project) -> Iterator[Project]:
    """The project after `make deploy`, with a server, worker and watcher of its own."""
    del operated.env["PREFECT_API_URL"]
    operated.set_param("promote.approval", "false", "true")
    operated.commit()
    deploy(operated, "start", "--port", str(free_port()))
    yield operated
    deploy(operated, "stop")


def test_a_new_file_starts_a_retraining_that_waits_for_a_person(deployed: Project) -> None:
    url = api(deployed)
    give_feedback(deployed, "monday")

    def state() -> str:
        runs = query(url, "flow_runs/filter", {"flows": {"name": {"any_": ["retrain"]}}})
        return runs[0]["state"]["name"] if runs else ""

    wait_until(lambda: state() == "Suspended", 240)
    run = last_run(url, "retrain")
    assert champion(deployed) == ""
    wait_until(lambda: list((deployed.root / ".worktrees").iterdir()) == [], 30)

    answer = {"run_input": {"approved": True, "by": "Li", "reason": "read its answers"}}
    resume(url, run["id"], answer)
    wait_until(lambda: state() == "Promoted", 120)
    assert "Li" in champion(deployed)
    assert len(deployed.executed()) == len(STEPS)  # once


@pytest.mark.slow
def test_the_schedule_of_the_deployment_fires(deployed: Project) -> None:
    url = api(deployed)
    schedule = ["deployment", "schedule", "create", "retrain/weekly", "--cron", "* * * * *", "--replace", "-y"]
    deployed.command("prefect", *schedule)

    def ended() -> list[dict[str, object]]:
        runs = query(url, "flow_runs/filter", {"flows": {"name": {"any_": ["retrain"]}}, "sort": "START_TIME_ASC"})
        return [run for run in runs if run["state"]["name"] in ("Suspended", "No new data")]

    wait_until(lambda: len(ended()) >= 2, 400)
    assert [run["state"]["name"] for run in ended()][:2] == ["Suspended", "No new data"]
    assert all(run["auto_scheduled"] for run in ended())
    assert len(deployed.executed()) == len(STEPS)


def resume(url: str, run: str, body: dict[str, object]) -> None:
    import httpx

    answer = httpx.post(f"{url}/flow_runs/{run}/resume", json=body)
    assert answer.json()["status"] == "ACCEPT", answer.text


def champion(project: Project) -> str:
    """What is said of the champion's coming; empty without one."""
    done = project.command(sys.executable, "-m", "apps.cli", "champions")
    return done.stdout if "promote" in done.stdout else ""
