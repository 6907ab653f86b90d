"""The same project against servers elsewhere, by environment variables alone: PostgreSQL and an S3 store, really."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flows import guard
from flows.server import free_port, wait_until_up
from tasks import programs
from tests.pipeline.conftest import Project, last_run
from tests.pipeline.test_retrain import PAIR

pytestmark = pytest.mark.slow


@pytest.fixture
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server, without the database's name."""
    if not (shutil.which("initdb") and shutil.which("pg_ctl") and shutil.which("psql")):
        pytest.skip("needs PostgreSQL's initdb, pg_ctl and psql on PATH")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    shutil.chown(folder, *(("postgres", "postgres") if os.getuid() == 0 else (os.getuid(), os.getgid())))
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to run as root
    port = free_port()

    def command(*words: str) -> None:
        done = subprocess.run([*as_user, *words], cwd="/", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    command("initdb", "-D", str(folder / "db"), "-U", "glmflow", "-A", "trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    command("pg_ctl", "-D", str(folder / "db"), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        for name in ("prefect", "mlflow"):
            command(
                "psql", "-h", "127.0.0.1", "-p", str(port), "-U", "glmflow", "-c", f"create database {name}", "postgres"
            )
        yield f"glmflow@127.0.0.1:{port}"
    finally:
        command("pg_ctl", "-D", str(folder / "db"), "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment variables of an S3 store with the buckets `mlflow` and `dvc`."""
    pytest.importorskip("moto", reason="needs moto, the S3-compatible server")
    port = free_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with (
        (tmp_path / "s3.log").open("w") as log,
        guard.running(command, cwd=tmp_path, env=os.environ | env, stdout=log) as process,
    ):
        answers(env["AWS_ENDPOINT_URL"], process)
        for bucket in ("mlflow", "dvc"):
            httpx.put(f"{env['AWS_ENDPOINT_URL']}/{bucket}").raise_for_status()
        yield env
        process.terminate()


def answers(url: str, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Return when a server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)


@pytest.fixture
def servers(tmp_path: Path, postgres: str, s3: dict[str, str]) -> Iterator[dict[str, str]]:
    """Prefect's and MLflow's servers on PostgreSQL, artifacts in S3; what a client has to set."""
    home = tmp_path / "servers"
    home.mkdir()
    prefect, mlflow = free_port(), free_port()
    api, tracking = f"http://127.0.0.1:{prefect}/api", f"http://127.0.0.1:{mlflow}"
    env = (
        os.environ
        | s3
        | {
            "PREFECT_HOME": str(home),
            "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
    )
    serve_prefect = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect), "--no-ui"]
    serve_mlflow = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow), "--workers", "1"]
    serve_mlflow += ["--backend-store-uri", f"postgresql://{postgres}/mlflow", "--artifacts-destination", "s3://mlflow"]
    with (
        (home / "prefect.log").open("w") as prefect_log,
        (home / "mlflow.log").open("w") as mlflow_log,
        guard.running([sys.executable, "-m", *serve_prefect], cwd=home, env=env, stdout=prefect_log) as one,
        guard.running([sys.executable, "-m", *serve_mlflow], cwd=home, env=env, stdout=mlflow_log) as other,
    ):
        wait_until_up(api, one, home / "prefect.log")
        answers(tracking, other)
        yield s3 | {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": tracking, "GLMFLOW_DVC_REMOTE": "s3://dvc/cache"}
        one.terminate()
        other.terminate()


def test_servers_elsewhere(project: Project, servers: dict[str, str]) -> None:
    project.env |= servers
    project.flow()
    assert project.executed() == list(programs("ppo"))
    assert last_run(servers["PREFECT_API_URL"])["state"]["type"] == "COMPLETED"
    assert not (project.root / "mlruns" / "mlflow.db").exists()

    from mlflow import MlflowClient

    client = MlflowClient(servers["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("rlhf-pipeline")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["ppo.learning_rate"] == "0.0005"
    kept = httpx.get(f"{servers['AWS_ENDPOINT_URL']}/mlflow").text
    assert f"{run.info.run_id}/artifacts/params.yaml" in kept and ".html" in kept


def test_a_worker_on_another_machine(project: Project, prefect_api: str, s3: dict[str, str], tmp_path: Path) -> None:
    """Two checkouts and two homes that share git's origin, an S3 store and the servers, and nothing else."""
    origin, elsewhere = tmp_path / "origin.git", tmp_path / "elsewhere"
    elsewhere.mkdir()
    project.env |= s3
    project.dvc("remote", "add", "--local", "--default", "elsewhere", "s3://dvc/cache")
    give_data(project)
    project.dvc("push")
    project.git("clone", "--quiet", "--bare", ".", str(origin))
    project.git("remote", "add", "origin", str(origin))
    project.env["GLMFLOW_GIT_URL"] = f"file://{origin}"
    template = ["--base-job-template", "deploy/work-pools/process.json"]
    project.command("prefect", "work-pool", "create", "remote", "--type", "process", "--overwrite", *template)
    project.command(*["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deploy/prefect.yaml"])

    other = project.env | {
        "HOME": str(elsewhere),
        "DVC_SITE_CACHE_DIR": str(elsewhere / "dvc"),
        "PREFECT_HOME": str(elsewhere / "prefect"),
        "GLMFLOW_DVC_REMOTE": "s3://dvc/cache",
        "MLFLOW_TRACKING_URI": f"sqlite:///{elsewhere}/mlflow.db",
    }
    variables = json.dumps({name: other[name] for name in ("GLMFLOW_DVC_REMOTE", "MLFLOW_TRACKING_URI", *s3)})
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "remote"]
    with (elsewhere / "log").open("w") as log, guard.running(worker, cwd=elsewhere, env=other, stdout=log) as process:
        start = ["prefect", "deployment", "run", "rlhf-pipeline/remote", "--watch", "--job-variable"]
        run = project.command(*start, f"env={variables}", check=False)
        process.terminate()
    said = (elsewhere / "log").read_text()
    assert run.returncode == 0, run.stdout + run.stderr + said
    assert project.executed() == list(programs("ppo"))
    assert (
        not (project.root / ".worktrees").exists()
        and not (project.root / "models").exists()
        and project.git("status", "--porcelain") == ""
    )

    # here, and in a third checkout that has nothing yet, the worker's results are had without computing
    name = last_run(prefect_api)["name"]
    third = Project(tmp_path / "third", tmp_path / "home3", None)
    third.env |= s3 | {"EXECUTED": str(project.log)}
    project.git("clone", "--quiet", str(origin), str(third.root))
    third.dvc("remote", "add", "--local", "--default", "elsewhere", "s3://dvc/cache")
    for checkout in (project, third):
        checkout.dvc("exp", "pull", "--run-cache", "origin", name)
        checkout.dvc("exp", "apply", name)
        assert "很好" in (checkout.root / "data" / "answers.jsonl").read_text()
        assert (checkout.root / "models" / "ppo" / "made_with.json").exists()
        assert "up to date" in checkout.dvc("repro")
    assert project.executed() == []


def give_data(project: Project) -> None:
    """A dataset that DVC tracks and git does not have."""
    file = project.root / "data" / "answers.jsonl"
    file.write_text(json.dumps(PAIR, ensure_ascii=False) + "\n")
    project.dvc("add", "data/answers.jsonl")
    registry = project.root / "data" / "dataset_info.json"
    registry.write_text(json.dumps(json.loads(registry.read_text()) | {"answers": {"file_name": "answers.jsonl"}}))
    project.set_param("data.reward", "[reviews_pairs]", "[reviews_pairs, answers]")
    project.commit()
