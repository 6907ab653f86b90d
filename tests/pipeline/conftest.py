"""A project of its own for each test: a copy of the checkout's files in a fresh repository, and an empty home."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import httpx
import psutil
import pytest

from flows import guard
from flows.server import free_port, wait_until_up
from glm.config import Algorithm
from tasks import programs

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


class Project:
    """A checkout, and what tests do with it."""

    def __init__(self, root: Path, home: Path, api: str | None) -> None:
        self.root = root
        self.log = home / "executed"
        self.env = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "EXECUTED": str(self.log),
            "DVC_SITE_CACHE_DIR": str(home / "dvc"),
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "true",
            "DO_NOT_TRACK": "true",
            "PYTHONUNBUFFERED": "1",
        } | ({"PREFECT_API_URL": api} if api else {})

    def command(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, cwd=self.root, env=self.env | env, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done

    def git(self, *words: str) -> str:
        return self.command("git", "-c", "user.name=a", "-c", "user.email=a@b", *words).stdout

    def dvc(self, *words: str) -> str:
        return self.command("dvc", *words).stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "state")

    def flow(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return self.command(sys.executable, "-m", "flows.rlhf_pipeline", *words, check=check, **env)

    def start_flow(self, *words: str, module: str = "flows.rlhf_pipeline", **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", module, *words]
        out = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.root, env=self.env | env, stdout=out, stderr=out, text=True)

    def executed(self) -> list[str]:
        """The stages that were executed since this was last asked."""
        steps = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return steps

    def wait_for(self, step: str, seconds: float = 60) -> None:
        """Return when `step` is being executed."""
        deadline = time.monotonic() + seconds
        while not (self.log.exists() and step in self.log.read_text().split()):
            assert time.monotonic() < deadline, f"{step} did not start"
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Everything that this project's commands have started and that still runs."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("EXECUTED") == str(self.log) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_runs(self, seconds: float = 15) -> None:
        """After a grace for those that are closing their books."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, [process.cmdline() for process in left]

    def set_param(self, name: str, old: str, new: str) -> None:
        """Change one line of params.yaml below its section."""
        section, key = name.split(".")
        path = self.root / "params.yaml"
        head, rest = path.read_text().split(f"\n{section}:\n", 1)
        assert f"  {key}: {old}" in rest
        path.write_text(f"{head}\n{section}:\n" + rest.replace(f"  {key}: {old}", f"  {key}: {new}", 1))


def copy_checkout(root: Path) -> None:
    """What is, or is about to be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all tests."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    env = os.environ | {"PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-ui",
    ]
    with (home / "log").open("w") as log, guard.running(command, cwd=home, env=env, stdout=log) as process:
        wait_until_up(url, process, home / "log")
        yield url
        process.terminate()


@pytest.fixture
def project(tmp_path: Path, prefect_api: str) -> Iterator[Project]:
    """The checkout with trivial stages and a trivial registry."""
    root, home = tmp_path / "project", tmp_path / "home"
    home.mkdir()
    copy_checkout(root)
    shutil.copy(HERE / "trivial_stage.py", root / "tasks" / "trivial.py")
    for program in {program for algorithm in get_args(Algorithm) for program in programs(algorithm)}:
        (root / "tasks" / f"{program}.py").write_text(f"from tasks.trivial import main\n\nmain({program!r})\n")
    with (root / "flows" / "registry.py").open("a") as file:
        file.write((HERE / "trivial_registry.py").read_text())
    project = Project(root, home, prefect_api)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    yield project
    for process in project.processes():
        process.kill()


def last_run(api: str, flow_name: str = "rlhf-pipeline") -> dict[str, Any]:
    """The newest flow run, with the states of its tasks by name."""
    run = query(
        api, "flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1, "flows": {"name": {"any_": [flow_name]}}}
    )[0]
    tasks = query(api, "task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    return run | {"tasks": {task["name"]: task["state"]["name"] for task in tasks}}


def query(api: str, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ask the Prefect API."""
    answer = httpx.post(f"{api}/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    answer.raise_for_status()
    return answer.json()
