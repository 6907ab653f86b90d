"""What a person sees while the pipeline runs: every stage, the running one with its bar, the time gone and to come.

A stage tells how far it is in a small file (GLMFLOW_PROGRESS), so nothing has to be parsed or connected.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from glm.files import write_json, write_text

# Seconds of each stage of the embedded default on two cores, for the first run; later ones know better.
FIRST_GUESS = {
    **dict(fetch=5, preprocess=8, base=80, sft=60, evaluate_sft=25, reward=50, reward_judge=50),
    **dict(policy=90, evaluate=30, export=20, register=20, judge=60),
}
NOTES = {"ran": "", "cached": "from the cache", "failed": "failed", "stopped": "stopped"}
LOOKS = {  # mark and style of each state
    "waiting": (" ", "dim"),
    "running": ("▶", "bold cyan"),
    "ran": ("✓", "green"),
    "cached": ("=", "blue"),
    "failed": ("✗", "bold red"),
    "stopped": ("✗", "yellow"),
}


BOARD_FILE = "GLMFLOW_BOARD"  # environment variable: where a run keeps its board, for whoever watches from outside


def progress_file(root: Path) -> Path:
    """Where the stages that this process starts in `root` say how far they are."""
    return root / ".dvc" / "tmp" / f"progress-{os.getpid()}.json"


def write_progress(path: Path, step: str, text: str) -> None:
    """Put a remark into the progress file, as a stage would."""
    write_text(path, json.dumps({"step": step, "done": 0, "total": 0, "text": text}) + "\n")


def read_progress(path: Path) -> dict[str, Any]:
    """What the running stage last said: step, done, total, text; empty if it has not spoken yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


@dataclass
class Step:
    """One line of the board."""

    name: str
    guess: float  # seconds that it will take
    state: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0


class Board:
    """The state of a run's steps: drawn live on a terminal, else told in a line a change; and kept in BOARD_FILE."""

    def __init__(self, names: Sequence[str], root: Path, unchanged: Sequence[str]) -> None:
        """Expects each step of `names` to take as long as it last did in `root`; the unchanged ones, no time."""
        self.file = progress_file(root)
        self.steps = [Step(name, 0.0 if name in unchanged else last_seconds(name, root)) for name in names]
        self.started = time.monotonic()
        self.parent_run: str | None = None  # in MLflow
        self.console = Console()

    def shown(self) -> AbstractContextManager[object]:
        """While this lasts, a terminal shows the board; it stays there at the end."""
        return Live(self, console=self.console, refresh_per_second=4) if self.console.is_terminal else nullcontext()

    @contextmanager
    def running(self, name: str) -> Iterator[Step]:
        """Time a step. The block sets its `state`; one that ends with an error has failed."""
        step = next(step for step in self.steps if step.name == name)
        step.state, step.started = "running", time.monotonic()
        self._say(f"{name}: running, about {clock(self.remaining())} to go in all")
        try:
            yield step
        except Exception:
            step.state = "failed"
            raise
        except BaseException:
            step.state = "stopped"
            raise
        finally:
            step.seconds = time.monotonic() - step.started
            self.file.unlink(missing_ok=True)
            self._say(f"{name}: {NOTES[step.state] or 'done'} ({clock(step.seconds)})")

    def remaining(self) -> float:
        """Estimated seconds until the last step is done: by the running step's pace, the more the further it is."""
        said = read_progress(self.file)
        fraction = said["done"] / said["total"] if said.get("total") else 0.0
        total = sum(step.guess for step in self.steps if step.state == "waiting")
        for step in self.steps:
            if step.state == "running":
                gone = time.monotonic() - step.started
                by_guess = max(step.guess - gone, 0.0)
                by_pace = gone / fraction - gone if fraction else 0.0
                total += fraction * by_pace + (1 - fraction) * by_guess
        return total

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for step in self.steps:
            mark, style = LOOKS[step.state]
            table.add_row(Text(mark, style), Text(step.name, style), *self._columns(step))
        gone = clock(time.monotonic() - self.started)
        left = f", about {clock(self.remaining())} to go" if self.steps[-1].state == "waiting" else ""
        return Group(table, Text(f"{gone} gone{left}", "dim"))

    def _columns(self, step: Step) -> list[RenderableType]:
        """Time, bar and remark of one step."""
        if step.state == "waiting":
            return [Text(f"~{clock(step.guess)}" if step.guess else "", "dim")]
        if step.state != "running":
            return [clock(step.seconds), Text(NOTES[step.state], "dim")]
        said = read_progress(self.file)
        done, total = said.get("done", 0), said.get("total", 0)
        bar = ProgressBar(total=total or None, completed=done, width=30, pulse=not total)
        remark = f"{done}/{total} {said['text']}" if total else said.get("text", "")
        return [clock(time.monotonic() - step.started), bar, Text(remark, "dim")]

    def _say(self, line: str) -> None:
        if not self.console.is_terminal:
            print(line, flush=True)
        if path := os.environ.get(BOARD_FILE):
            steps = [asdict(step) for step in self.steps]
            state = {"file": str(self.file), "started": self.started, "parent_run": self.parent_run, "steps": steps}
            write_json(path, state)


def read_board(path: Path) -> Board | None:
    """The board of a run of this machine as its BOARD_FILE has it; None before its first step."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    board = Board([], Path(), [])
    board.steps = [Step(**step) for step in state["steps"]]
    board.file, board.started, board.parent_run = Path(state["file"]), state["started"], state["parent_run"]
    return board


def last_seconds(step: str, root: Path) -> float:
    """How long a step took when its present output was made, else the first guess."""
    try:
        return float(json.loads((root / "runs" / f"{step}.json").read_text(encoding="utf-8"))["seconds"])
    except (FileNotFoundError, KeyError):
        return float(FIRST_GUESS.get(step, FIRST_GUESS["policy"]))  # a policy goes by its algorithm


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
