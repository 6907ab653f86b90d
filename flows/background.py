"""Pipeline runs in processes of their own, for who starts them and may go away: they go on, and are found again.

    python -m flows.background FOLDER [words of flows.rlhf_pipeline …]

Each run has a folder below .prefect/runs/: run.json (its words, process and time), log.txt, board.json (how far it is),
`stop` once it has been asked to stop, and `status`, its exit status, once it has ended by itself.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil

from flows import ROOT, guard
from flows.dvc_stage import stage_environment
from flows.progress import BOARD_FILE, Board, read_board
from glm.errors import InputError
from glm.files import write_json, write_text

RUNS = ROOT / ".prefect" / "runs"
NAME = re.compile(r"\d{8}-\d{6}-\d{6}")
TAIL_BYTES = 32_000
State = Literal["running", "stopping", "done", "failed", "refused", "stopped", "killed"]
ENDS: dict[str, State] = {"0": "done", "2": "refused", "130": "stopped"}  # by exit status; any other: failed


@dataclass(frozen=True)
class BackgroundRun:
    """One run; `words` are those of the command line of flows.rlhf_pipeline."""

    name: str
    words: list[str]
    pid: int
    process_started: float
    at: str

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    def state(self) -> State:
        """What it is doing, or how it has ended. `killed`: it is gone without having said why."""
        asked = (self.folder / "stop").exists()
        if self._process():
            return "stopping" if asked else "running"
        status = self.folder / "status"
        if status.exists():
            return ENDS.get(status.read_text(encoding="utf-8").strip(), "failed")
        return "stopped" if asked else "killed"

    def board(self) -> Board | None:
        """Its steps; None before the first one."""
        return read_board(self.folder / "board.json")

    def log_tail(self) -> str:
        """The end of what it has said."""
        with (self.folder / "log.txt").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
        return text if size <= TAIL_BYTES else text.partition("\n")[2]

    def stop(self) -> None:
        """Do what Ctrl-C does: the step at work closes its books and ends. Asked again: it ends at once."""
        if process := self._process():
            (self.folder / "stop").touch()
            process.send_signal(signal.SIGINT)

    def _process(self) -> psutil.Process | None:
        """Its process, if it still runs; an equal number given to a later process does not count."""
        try:
            process = psutil.Process(self.pid)
            alive = process.create_time() == self.process_started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None


def start(words: Sequence[str]) -> BackgroundRun:
    """Start `flows.rlhf_pipeline` with these words; it outlives this process.

    Raises:
        InputError: a run that was started in this way is still at work.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    with guard.lock(RUNS / "start.lock"):  # two people may press the button at once
        if busy := next((run for run in runs() if run.state() in ("running", "stopping")), None):
            raise InputError(f"the run {busy.name} is at work: wait for its end, or stop it")
        name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        folder = RUNS / name
        folder.mkdir()
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.background", str(folder), *words],
                cwd=ROOT,
                env=stage_environment() | {BOARD_FILE: str(folder / "board.json"), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        run = BackgroundRun(name, list(words), process.pid, psutil.Process(process.pid).create_time(), _now())
        write_json(folder / "run.json", asdict(run))
    return run


def names() -> list[str]:
    """Of all of them, the newest first."""
    return sorted((record.parent.name for record in RUNS.glob("*/run.json")), reverse=True)


def runs() -> list[BackgroundRun]:
    """All of them, the newest first."""
    return [find(name) for name in names()]


def find(name: str) -> BackgroundRun:
    """The run of this name.

    Raises:
        InputError: there is none.
    """
    record = RUNS / name / "run.json"
    if not NAME.fullmatch(name) or not record.exists():
        raise InputError(f"run {name!r}: there is none of this name")
    return BackgroundRun(**json.loads(record.read_text(encoding="utf-8")))


def main() -> int:
    """Run the pipeline in this process, its log on standard output, and keep its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a page that itself ignores Ctrl-C hands that down
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    status = 1
    try:
        from flows.rlhf_pipeline import main as run_pipeline

        shown = logging.StreamHandler(sys.stdout)
        for name in ("prefect.flow_runs", "prefect.task_runs"):  # what the steps say
            logging.getLogger(name).addHandler(shown)
        status = run_pipeline(words)
    except KeyboardInterrupt:
        status = 130
    finally:
        write_text(folder / "status", f"{status}\n")
    return status


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
