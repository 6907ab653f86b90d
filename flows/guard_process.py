"""The program between a command and the process that asked for it: see flows/guard.py, which starts it.

Its arguments: the parent's process id, the time limit in seconds (0: none), the command.

Where this program and its parent are killed at once, nobody is left to stop the command. So the kernel tells that too,
and a step below it, which may have a shell between, looks by itself (`follow_guard` in tasks/launch.py).
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
TIMED_OUT = 124  # exit status, as of timeout(1)

prctl = ctypes.CDLL(None, use_errno=True).prctl


def guard(parent: int, time_limit: float, command: list[str]) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _terminated)
    _follow(parent)
    me = os.getpid()
    os.environ["GLMFLOW_GUARD"] = str(me)
    try:
        try:
            # close_fds=False: the lock's descriptor goes on to the command
            process = subprocess.Popen(command, close_fds=False, preexec_fn=lambda: _follow(me))
            return process.wait(time_limit or None)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        _stop_descendants()


def _follow(parent: int) -> None:
    """Have the kernel tell this process when its parent has died."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told to say so
        os._exit(128 + signal.SIGTERM)


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
    sys.exit(guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
