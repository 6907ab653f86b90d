"""One stage in several processes, one a GPU: it starts itself again under torch's launcher, as `accelerate launch`.

The processes live and die together. The first one does all that is seen from outside: log, MLflow, outputs.
"""

import ctypes
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

import psutil

from glm.config import Launch
from glm.errors import InputError

PATIENCE = 60.0  # seconds that the first process has for an error that all have, its MLflow run included
PR_SET_PDEATHSIG = 1  # linux/prctl.h
GUARD = "GLMFLOW_GUARD"  # environment variable: the process of flows/guard_process.py that this one runs under
GUARD_SECONDS = 1.0  # between two looks at it
GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def launched() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return "LOCAL_RANK" in os.environ


def first() -> bool:
    """Whether this process is the only or the first one, which writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def check_engine(launch: Launch) -> None:
    """Raise an InputError if the engine that the strategy names is not installed."""
    wanted = launch.num_processes > 1 and launch.strategy == "deepspeed_zero3"
    if wanted and importlib.util.find_spec("deepspeed") is None:
        raise InputError("launch.strategy deepspeed_zero3: needs DeepSpeed: pip install -r requirements-deepspeed.lock")


def launch(launch: Launch, command: Sequence[str], name: str) -> int:
    """Run `command`, a Python program's arguments, in `num_processes` processes; returns the exit status of the step.

    When one of them ends otherwise than well, or this process is told to end, the others are ended too: by SIGTERM, and
    those that do not listen within half a minute by SIGKILL.

    Raises:
        InputError: fewer GPUs than processes, or no engine for the strategy.
    """
    check_engine(launch)
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    number, gpus = launch.num_processes, torch.cuda.device_count()
    if torch.cuda.is_available() and number > gpus:
        raise InputError(f"launch.num_processes: {number}, but this machine has {gpus} GPUs")
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ["OMP_NUM_THREADS"]) // number))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says, is said below
    with tempfile.TemporaryDirectory() as scratch:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=number,
            run_id=name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(scratch),
        )
        try:
            elastic_launch(config, sys.executable)(*command)
            return 0
        except ChildFailedError as error:
            return exit_status(name, number, {rank: failure.exitcode for rank, failure in error.failures.items()})
        except SignalException as error:
            return 128 + error.sigval


def follow_launcher() -> None:
    """Make the kernel end this process when the launcher is gone, however that came about."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def follow_guard() -> None:
    """End this process, first politely, when its flow and the guard between them have been killed at once.

    The kernel would tell it only of its own parent: DVC, or a shell of DVC's, which outlives DVC.
    """
    if GUARD in os.environ:
        Thread(target=_end_with, args=(int(os.environ[GUARD]),), daemon=True).start()


def _end_with(number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        guard = psutil.Process(number)
        while guard.is_running() and guard.status() != psutil.STATUS_ZOMBIE:
            time.sleep(GUARD_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)  # a main thread that waits in a library, for a process that is gone too, does not listen
    os.kill(os.getpid(), signal.SIGKILL)


def let_the_first_speak() -> None:
    """Before a word about an error: what all processes meet is told once, since the launcher ends the others then."""
    if not first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)


class Silence:
    """Stands where a `StepRun` would, in the processes that are not the first."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: the first process has the same numbers."""

    def write(self, what: Any) -> None:
        """Nothing."""


def exit_status(name: str, number: int, failures: dict[int, int]) -> int:
    """The step's exit status by those of the processes that failed, with a word about one that was killed."""
    stopped = (-signal.SIGTERM, 128 + signal.SIGTERM)  # because of another one
    rank, code = min(failures.items(), key=lambda failure: (failure[1] in stopped, failure[1] >= 0, failure[0]))
    if code >= 0:
        return code
    print(
        f"{name}: process {rank} of {number} was ended by {signal.Signals(-code).name}, so the others were stopped; "
        "give the same command again to go on from the last checkpoint",
        file=sys.stderr,
    )
    return 1
