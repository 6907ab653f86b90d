"""What may break under a run: processes, servers, the disk, the cache. Nothing is lost, and a plain re-run finishes."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from flows import guard
from flows.server import free_port, wait_until_up
from tasks import programs
from tasks.lineage import hashes_in_lock
from tests.pipeline.conftest import Project, last_run
from tests.pipeline.test_deploy import api, deploy, deployed, wait_until  # noqa: F401
from tests.pipeline.test_repair import damage

TRIALS = int(os.environ.get("GLMFLOW_KILL_TRIALS", "3"))  # `make test-slow` sets 20


def assert_whole(project: Project) -> None:
    """After a re-run: outputs are what dvc.lock says, nothing half-written lies about, nothing runs."""
    assert "up to date" in project.dvc("repro")
    assert project.dvc("status").strip() == "Data and pipelines are up to date."
    for folder in ("prepared", "models", "metrics", "plots", "reports", "runs"):
        assert [path for path in (project.root / folder).rglob("*") if path.name.startswith(".")] == [
            path for path in (project.root / folder).rglob(".gitignore")
        ]
    project.assert_nothing_runs()


@pytest.mark.slow
def test_kill_9_at_random_moments(project: Project, tmp_path: Path) -> None:
    """In each trial one process of the run is killed: the flow, its server, a guard, DVC or a step, at any moment.

    GLMFLOW_KILL_SEED repeats the choices of an earlier run. A trial takes half a minute on an idle machine.
    """
    seed = int(os.environ.get("GLMFLOW_KILL_SEED", random.randrange(10**6)))
    print(f"GLMFLOW_KILL_SEED={seed}")
    chance = random.Random(seed)
    api = project.env.pop("PREFECT_API_URL")
    project.env |= {f"SLEEP_{step}": "0.3" for step in programs("ppo")}
    for trial in range(TRIALS):
        own_server = chance.random() < 0.3
        env = {} if own_server else {"PREFECT_API_URL": api}
        (project.root / "data" / "trial").write_text(f"{seed} {trial}")  # new data: every step has to run
        project.executed()
        flow = project.start_flow(**env)
        step, seconds = chance.choice(["", *programs("ppo")]), chance.uniform(0, 3)
        if step:
            project.wait_for(step, seconds=300)
        time.sleep(seconds)
        if victims := project.processes():
            victim = chance.choice(victims)
            print(f"trial {trial}: {seconds:.1f} s after {step or 'its start'}: {' '.join(victim.cmdline())[-70:]}")
            victim.send_signal(signal.SIGKILL)
        _, errors = flow.communicate(timeout=300)
        assert flow.returncode in (0, 1, -signal.SIGKILL), errors
        assert "Traceback" not in errors, errors
        project.assert_nothing_runs(30)
        project.flow(PREFECT_API_URL=api)
        assert_whole(project)
        steps = project.executed()
        assert set(steps) == set(programs("ppo"))
        assert len(steps) <= len(set(steps)) + 1, steps  # again only the one at which it happened
        assert running_in_mlflow(project) == []

    # the results are those of a run that nobody disturbed
    undisturbed = Project(tmp_path / "undisturbed", project.log.parent, None)
    undisturbed.env |= project.env | {"GLMFLOW_PROGRESS": str(tmp_path / "progress")}
    project.git("clone", "--quiet", ".", str(undisturbed.root))
    shutil.copy(project.root / "data" / "trial", undisturbed.root / "data" / "trial")
    undisturbed.dvc("repro")
    assert hashes_in_lock(project.root / "dvc.lock") == hashes_in_lock(undisturbed.root / "dvc.lock")


def running_in_mlflow(project: Project) -> list[str]:
    """The runs that the store takes to be at work."""
    with closing(sqlite3.connect(project.root / "mlruns" / "mlflow.db")) as database:
        return [name for (name,) in database.execute("select name from runs where status = 'RUNNING'")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A Prefect server to be killed: its API and its process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    home = tmp_path / "server"
    home.mkdir()
    env = os.environ | {"PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "log").open("w") as log,
        guard.running([*command, "--no-ui"], cwd=home, env=env, stdout=log) as process,
    ):
        wait_until_up(url, process, home / "log")
        yield url, process
        process.terminate()


@pytest.mark.slow
def test_the_prefect_server_dies_in_the_middle(project: Project, server: tuple[str, subprocess.Popen[str]]) -> None:
    project.env["PREFECT_API_URL"], process = server
    flow = project.start_flow(SLEEP_sft="2")
    project.wait_for("sft", seconds=180)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    output, errors = flow.communicate(timeout=300)
    assert flow.returncode == 0, errors
    assert "Before and after" in output
    assert "going on without it" in errors
    assert project.executed() == list(programs("ppo"))  # each once
    assert_whole(project)


def test_no_prefect_server_at_the_start(project: Project) -> None:
    project.env["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    done = project.flow()
    assert "does not answer" in done.stderr
    assert project.executed() == list(programs("ppo"))


@pytest.mark.slow
def test_worker_and_run_killed_together_leave_the_slot(deployed: Project) -> None:  # noqa: F811
    url = api(deployed)
    run = ["prefect", "deployment", "run", "rlhf-pipeline/default"]
    deployed.command(*run)
    deployed.wait_for("sft", seconds=90)
    for process in deployed.processes():
        if "server" not in process.cmdline():
            process.kill()
    wait_until(lambda: not any("dvc" in process.cmdline() for process in deployed.processes()), 30)
    dead = last_run(url)
    assert dead["state"]["type"] == "RUNNING"  # nobody could say otherwise
    deployed.executed()
    del deployed.env["SLEEP_sft"]
    started = time.monotonic()
    deploy(deployed, "start")
    deployed.command(*run, "--watch")
    assert time.monotonic() - started < 150
    assert deployed.executed() == list(programs("ppo")[3:])
    assert last_run(url)["state"]["type"] == "COMPLETED"
    found = deployed.command("prefect", "flow-run", "ls", "--state-type", "CRASHED", COLUMNS="200").stdout
    assert dead["name"] in found  # a narrow table would cut it off


def test_a_full_disk(tmp_path: Path, prefect_api: str, request: pytest.FixtureRequest) -> None:
    disk = tmp_path / "project"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    request.addfinalizer(lambda: subprocess.run(["umount", "--lazy", str(disk)], check=True))
    project: Project = request.getfixturevalue("project")
    flow = project.start_flow(SLEEP_sft="3")
    project.wait_for("sft", seconds=180)
    filler = project.root / "mlruns" / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    _, errors = flow.communicate(timeout=300)
    assert flow.returncode == 1, errors
    assert "No space left" in errors or "disk" in errors
    project.assert_nothing_runs()
    filler.unlink()
    project.flow()
    assert_whole(project)


@pytest.mark.slow
def test_corrupted_cache_entries(project: Project) -> None:
    project.flow()
    project.executed()
    cache = project.root / ".dvc" / "cache"
    made = project.root / "models" / "sft" / "made_with.json"
    content = made.read_bytes()
    listing = Path(project.dvc("get", ".", "models/sft", "--show-url").strip())
    entry = next(path for path in cache.glob("files/md5/??/*") if path.read_bytes() == content)
    for pattern in (entry, listing, cache / "runs/*/*/*", project.root / ".prefect/storage/*"):
        broken = list(project.root.glob(str(pattern.relative_to(project.root))))
        assert broken
        for path in broken:
            damage(path)
        shutil.rmtree(made.parent)
        project.flow()
        assert made.read_bytes() == content
        assert set(project.executed()) <= {"sft"}
    assert_whole(project)

    # a lock of a DVC that was killed before its number went to another program
    (cache.parent / "tmp" / "rwlock").write_text(json.dumps({"write": {str(made.parent): {"pid": 1, "cmd": "dvc"}}}))
    shutil.rmtree(made.parent)
    project.flow()
    assert made.read_bytes() == content

    # a corrupted file again, in a workspace, which takes everything out of the cache
    project.commit()
    damage(entry)
    project.flow("-S", "evaluate.max_samples=5")
    assert project.executed()[0] == "sft"
    assert entry.read_bytes() == content
