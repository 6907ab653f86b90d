"""Run a command whose whole process tree ends with the process that asked for it, however that one ends.

A training must not outlive its flow and hold the GPU: not after Ctrl-C, a cancelled run, or kill -9. `run` starts this
file as a small program between the two: the kernel tells it when its parent has died (PR_SET_PDEATHSIG), it adopts
whatever its descendants leave behind (PR_SET_CHILD_SUBREAPER), and it stops them all before it ends. Linux only.

`lock` is a kernel lock (flock) whose descriptor `run` hands down, so that the lock lives exactly as long as the work it
covers; a lock file with an owner's name in it would stay behind after kill -9.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
TIMED_OUT = 124  # exit status, as of timeout(1)


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
            fcntl.flock(descriptor, fcntl.LOCK_EX)
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
        [sys.executable, "-I", __file__, str(os.getpid()), str(time_limit or 0), *command],
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
    try:
        yield process
        process.wait()
    finally:
        process.terminate()
        process.wait()


def _guard(parent: int, time_limit: float, command: list[str]) -> int:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _terminated)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told to say so
        return 128 + signal.SIGTERM
    try:
        try:
            # close_fds=False: the lock's descriptor goes on to the command
            return subprocess.Popen(command, close_fds=False).wait(time_limit or None)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        _stop_descendants()


def _terminated(number: int, frame: FrameType | None) -> None:
    # Once is enough: a parent that is killed has the kernel say so for each of its threads, and a second exception
    # would end the stopping of descendants that the first one began.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _stop_descendants() -> None:
    import psutil

    me = psutil.Process()
    for descendant in (gone := me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            descendant.terminate()
    psutil.wait_procs(gone, timeout=GRACE)
    while left := me.children(recursive=True):  # those that did not listen, and what they started meanwhile
        for descendant in left:
            with suppress(psutil.NoSuchProcess):
                descendant.kill()
        psutil.wait_procs(left, timeout=1)


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
