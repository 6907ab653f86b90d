"""Run a command whose whole process tree ends with the process that asked for it, however that one ends.

A training must not outlive its flow and hold the GPU: not after Ctrl-C, a cancelled run, or kill -9. `running` puts a
small program between the two (guard_process.py): the kernel tells it when its parent has died (PR_SET_PDEATHSIG), it
adopts whatever its descendants leave behind (PR_SET_CHILD_SUBREAPER), and it stops them all before it ends. Where it is
itself killed, a thread here stops what it guarded. Linux only.

`lock` is a kernel lock (flock) whose descriptor `running` hands down, so that the lock lives exactly as long as the
work it covers; a lock file with an owner's name in it would stay behind after kill -9.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

from flows import guard_process
from flows.guard_process import GRACE
from flows.guard_process import TIMED_OUT as TIMED_OUT
from flows.interrupt import interruptible


@contextmanager
def lock(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold an exclusive kernel lock on `path`; yields its descriptor. `on_wait` is called if somebody else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            interruptible(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def running(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    time_limit: float | None = None,
    hold: Sequence[int] = (),
    stdout: int | IO[str] = subprocess.PIPE,
) -> Iterator[subprocess.Popen[str]]:
    """Run `command` under a guard; its output, stderr included, is the process's `stdout`.

    `hold` are descriptors that the command keeps open (a lock's). The block's end waits for the command; an error in
    the block ends the whole tree within GRACE seconds. The exit status is TIMED_OUT after `time_limit` seconds. The
    calling thread has to outlive the command: for the kernel it is the parent.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", guard_process.__file__, str(os.getpid()), str(time_limit or 0), *command],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=hold,
        start_new_session=True,  # Ctrl-C reaches the flow alone, which then stops the guard
    )
    Thread(target=_stop_orphans, args=(process,), daemon=True).start()
    try:
        yield process
        interruptible(process.wait)
    finally:
        process.terminate()
        process.wait()


def _stop_orphans(process: subprocess.Popen[str]) -> None:
    """Wait for a guard. If a signal has ended it (kill -9, a crash), end what is left of its process group."""
    process.wait()
    if process.returncode >= 0:
        return
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.1)
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """What a process of `running` says, line by line."""
    assert process.stdout is not None
    while line := interruptible(process.stdout.readline):
        yield line
