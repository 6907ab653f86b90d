"""A stage never outlives its flow, whatever ends the flow; and the next run goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows import guard
from tests.pipeline.conftest import ROOT, Project, last_run

REST = ["sft", "evaluate_sft", "reward", "reward_judge", "ppo", "evaluate", "export"]


def test_kill_9_of_flow_and_guard_leaves_no_process_and_the_next_run_goes_on(project: Project) -> None:
    flow = project.start_flow(SLEEP_sft="120")
    project.wait_for("sft")
    watcher = next(process for process in project.processes() if "guard_process.py" in " ".join(process.cmdline()))
    watcher.suspend()  # it sees nothing of the flow's end: both go at once
    flow.kill()
    flow.communicate()
    watcher.kill()
    project.assert_nothing_runs()
    project.executed()
    project.flow()
    assert project.executed() == REST


def test_kill_9_takes_the_flows_own_server_too(project: Project) -> None:
    del project.env["PREFECT_API_URL"]
    flow = project.start_flow(SLEEP_fetch="120")
    project.wait_for("fetch", seconds=120)
    assert any("server" in process.cmdline() for process in project.processes())
    flow.kill()
    flow.communicate()
    project.assert_nothing_runs()


def test_ctrl_c_stops_cleanly(project: Project, prefect_api: str) -> None:
    flow = project.start_flow(SLEEP_sft="120")
    project.wait_for("sft")
    flow.send_signal(signal.SIGINT)
    _, errors = flow.communicate(timeout=60)
    assert flow.returncode == 130
    assert "Nothing is left running" in errors and "Traceback" not in errors
    assert project.processes() == []
    assert last_run(prefect_api)["state"]["type"] == "CRASHED"


@pytest.mark.parametrize("flow", ["rlhf_pipeline", "retrain", "compare_methods", "deploy"])
def test_ctrl_c_while_it_is_still_importing(flow: str) -> None:
    command = [sys.executable, "-m", f"flows.{flow}", "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any("pydantic_core" in part.path for part in psutil.Process(process.pid).memory_maps()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "Stopped before it began.\n")
    assert process.returncode == 130


CTRL_C = """
import queue, sys, time
from pathlib import Path
from flows.interrupt import handle_ctrl_c, interruptible

handle_ctrl_c(Path(sys.argv[1]), stop_seconds=float(sys.argv[2]))
print("up", flush=True)
"""
BUSY = """
numbers = queue.Queue()
end = time.monotonic() + 0.5
while time.monotonic() < end:  # an exception in here would leave the queue locked in one case of four
    numbers.put(1)
    numbers.get()
try:
    interruptible(time.sleep, 60)
except KeyboardInterrupt:
    print(numbers.mutex.locked())
try:
    interruptible(time.sleep, 60)  # whoever swallows the exception meets it again
except KeyboardInterrupt:
    print("again")
"""
STUCK = """
import threading
stuck = threading.Lock()
stuck.acquire()
stuck.acquire()
"""


def interrupt(program: str, tmp_path: Path, stop_seconds: float, times: int = 1) -> tuple[int, str, str]:
    """Start a program as a shell without job control does (`program &`): deaf to Ctrl-C; then press Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C + program, str(tmp_path / "hang.log"), str(stop_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    for _ in range(times):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


def test_ctrl_c_comes_up_only_where_the_program_waits(tmp_path: Path) -> None:
    assert interrupt(BUSY, tmp_path, stop_seconds=60) == (0, "False\nagain\n", "")


def test_ctrl_c_ends_a_program_that_does_not_listen(tmp_path: Path) -> None:
    status, _, errors = interrupt(STUCK, tmp_path, stop_seconds=0.5)
    assert status == 130
    assert "did not end by itself" in errors
    assert '"<string>", line' in (tmp_path / "hang.log").read_text()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    status, _, errors = interrupt(STUCK, tmp_path, stop_seconds=60, times=2)
    assert (status, errors) == (130, "Stopped at once.\n")


def test_the_workspace_of_a_killed_run_is_removed_by_the_next(project: Project) -> None:
    flow = project.start_flow("-S", "seed=1", SLEEP_fetch="120")
    project.wait_for("fetch")
    flow.kill()
    flow.communicate()
    project.assert_nothing_runs()
    assert len(project.git("worktree", "list").splitlines()) == 2
    (made,) = (project.root / ".worktrees").glob("*.lock")
    project.git("worktree", "lock", str(made.with_suffix("")))  # as git itself does until it has made one

    flow = project.start_flow("-S", "seed=1", SLEEP_base="120")
    project.wait_for("base")
    assert len(project.git("worktree", "list").splitlines()) == 2  # its own
    flow.send_signal(signal.SIGINT)
    flow.communicate(timeout=60)
    assert len(project.git("worktree", "list").splitlines()) == 1
    assert list((project.root / ".worktrees").iterdir()) == []
    assert project.git("status", "--porcelain") == ""


SPAWN = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = f"import signal, os; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); {SLEEP}"


@pytest.mark.parametrize("grandchild", [SLEEP, STUBBORN])
def test_guard_stops_grandchildren(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grandchild: str) -> None:
    command = [sys.executable, "-c", SPAWN, grandchild]
    with pytest.raises(KeyboardInterrupt), guard.running(command, cwd=tmp_path, env=os.environ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        raise KeyboardInterrupt
    assert not any(process.is_running() for process in family)


@pytest.mark.parametrize("attempt", range(5))
def test_guard_survives_being_told_many_times(tmp_path: Path, attempt: int) -> None:
    """The kernel says that the parent is gone once for each of the parent's threads."""
    command = [sys.executable, "-c", SPAWN, SLEEP]
    with guard.running(command, cwd=tmp_path, env=os.environ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        family = psutil.Process(process.pid).children(recursive=True)
        while process.poll() is None:
            process.terminate()
    assert len(family) == 2
    assert not psutil.wait_procs(family, timeout=15)[1]


def test_what_a_killed_guard_leaves_behind_is_stopped(tmp_path: Path) -> None:
    """And at once: a training would otherwise be at work unseen, with the lock and the GPU, until it ends."""
    command = [sys.executable, "-c", SPAWN, SLEEP]
    with guard.running(command, cwd=tmp_path, env=os.environ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert process.stdout.read() == ""  # its end: all who could write are gone
    assert process.returncode == -signal.SIGKILL
    assert len(family) == 2
    assert not psutil.wait_procs(family, timeout=15)[1]


def test_guard_keeps_the_time_limit(tmp_path: Path) -> None:
    started = time.monotonic()
    with guard.running([sys.executable, "-c", SLEEP], cwd=tmp_path, env=os.environ, time_limit=1) as process:
        pass
    assert process.returncode == guard.TIMED_OUT
    assert time.monotonic() - started < 10


def test_guard_passes_on_status_and_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"]
    with guard.running(command, cwd=tmp_path, env=os.environ) as process:
        assert process.stdout is not None and sorted(process.stdout.read().split()) == ["err", "out"]
    assert process.returncode == 7


def test_the_lock_lives_as_long_as_the_command(tmp_path: Path) -> None:
    """Its holder is gone, its command is not: nobody else gets the lock."""
    path = tmp_path / "lock"
    waited = []
    with guard.lock(path) as descriptor:
        process = guard.running(
            [sys.executable, "-c", "import time; time.sleep(2)"], cwd=tmp_path, env=os.environ, hold=[descriptor]
        )
        process.__enter__()
    started = time.monotonic()
    with guard.lock(path, lambda: waited.append(1)):
        assert time.monotonic() - started > 1
    assert waited == [1]
    process.__exit__(None, None, None)
