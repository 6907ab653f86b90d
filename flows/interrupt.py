"""Ctrl-C that surely ends a run.

Python raises KeyboardInterrupt between any two lines. One that comes up inside `queue.Queue.put` leaves that queue
locked for ever, and then the thread which sends Prefect's log never ends, nor does the process, which waits for it at
its exit; one in a `__del__` or a broad `except` is lost. So here the signal is only noted. The exception comes up in
`interruptible` calls: those in which a run waits (for a stage, a lock, a server) and holds nothing that others need.
What has not ended STOP_SECONDS later is ended by a thread that waits for nothing; a second Ctrl-C ends all at once.
Either way the kernel tells flows/guard_process.py, which stops the stage.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import ParamSpec, TypeVar

STOP_SECONDS = 45.0  # a stage has ten to close its books; then its run in MLflow and Prefect is closed
STATUS = 128 + signal.SIGINT

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_asked = False  # Ctrl-C came
_waiting = False  # the main thread is in an interruptible call
_bell = -1  # a pipe whose other end the watchdog reads


def handle_ctrl_c(hang_log: Path, stop_seconds: float = STOP_SECONDS) -> None:
    """From now on, Ctrl-C is treated as described above; to be called in the main thread.

    Args:
        hang_log: gets the stacks of all threads if the process has to be ended.
        stop_seconds: how long it may take to end by itself.
    """
    global _bell
    hear, _bell = os.pipe()
    Thread(target=_watch, args=(hear, hang_log, stop_seconds), daemon=True).start()
    signal.signal(signal.SIGINT, _on_ctrl_c)


def interruptible(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Result:
    """Call `function`, which waits, so that Ctrl-C breaks it off.

    Raises:
        KeyboardInterrupt: Ctrl-C comes, or has come before. Every later call raises it again, so that it is not lost
            where somebody catches it.
    """
    global _waiting
    _waiting = True  # first, so that a signal between the lines is not missed
    try:
        stop_if_asked()
        return function(*arguments, **options)
    finally:
        _waiting = False


def stop_if_asked() -> None:
    """Raise a KeyboardInterrupt if Ctrl-C has come."""
    if _asked:
        raise KeyboardInterrupt


def _on_ctrl_c(number: int, frame: FrameType | None) -> None:
    global _asked, _waiting
    if _asked:
        os.write(2, b"Stopped at once.\n")
        os._exit(STATUS)
    _asked = True
    os.write(_bell, b"!")
    if _waiting:
        _waiting = False
        raise KeyboardInterrupt


def _watch(hear: int, hang_log: Path, stop_seconds: float) -> None:
    os.read(hear, 1)
    time.sleep(stop_seconds)
    try:
        text = f"Stopped. It did not end by itself in {stop_seconds:g} s; {hang_log} says where it was.\n"
        os.write(2, text.encode())
        with hang_log.open("w") as log:
            faulthandler.dump_traceback(log)
    finally:
        os._exit(STATUS)
