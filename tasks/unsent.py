"""What a step could not send to MLflow, kept in a file until the store is back.

While the store fails, every point and tag of a step's run is appended to a file in `mlruns/unsent/` as it comes, so
that it outlives kill -9 too. The next run that reaches the store, or `glmflow sync`, sends the file and removes it.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tasks.tracking import log_params, main_checkout

if TYPE_CHECKING:
    from mlflow import MlflowClient

Point = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step


def folder() -> Path:
    """Where the files are: in the main checkout, from its worktrees too."""
    return main_checkout() / "mlruns" / "unsent"


class Journal:
    """The file of one step's run. Its kernel lock says that the step still writes it."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        """`run`: run_id (None if it could not be made), experiment, name, started, tags, params."""
        folder().mkdir(parents=True, exist_ok=True)
        self.path = folder() / f"{run['name']}-{uuid4().hex}.jsonl"
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._append(run)

    def points(self, points: Iterable[Point]) -> None:
        """Keep points of curves."""
        self._append({"points": list(points)})

    def end(self, status: str, tags: Mapping[str, str]) -> None:
        """Keep how the run ended."""
        self._append({"status": status, "tags": dict(tags), "ended": int(time.time() * 1000)})

    def named(self, run_id: str) -> None:
        """Keep the id of the run, which could be made after all."""
        self._append({"run_id": run_id})

    def remove(self) -> None:
        """Everything has reached the store."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _append(self, line: Mapping[str, Any]) -> None:
        with suppress(OSError):  # a full disk must not end the training
            os.write(self._descriptor, (json.dumps(line) + "\n").encode())


def send_unsent(client: "MlflowClient") -> list[str]:
    """Send what steps that have ended left behind. Returns the ids of the completed runs.

    Sending twice does no harm: the store keeps equal points once. What one file lacks does not keep the others.
    """
    sent = []
    for path in sorted(folder().glob("*.jsonl")):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process has sent it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                sent.append(_send(client, path))
                path.unlink()
        except BlockingIOError:
            pass  # its step is at work
        finally:
            os.close(descriptor)
    return sent


def _send(client: "MlflowClient", path: Path) -> str:
    from mlflow.entities import Metric, RunTag

    run, *lines = _complete_lines(path)
    end: dict[str, Any] = {"status": "KILLED", "tags": {}, "ended": int(path.stat().st_mtime * 1000)}
    run_id = next((line["run_id"] for line in [*lines, run] if line.get("run_id")), None)
    if run_id is None:
        experiment = client.get_experiment_by_name(run["experiment"])
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(run["experiment"])
        # the file's name is the run's identity: a sending that was broken off goes on in the same run
        found = client.search_runs([experiment_id], f"tags.`glmflow.unsent` = '{path.stem}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            tags = run["tags"] | {"glmflow.unsent": path.stem}
            run_id = client.create_run(experiment_id, run["started"], tags, run_name=run["name"]).info.run_id
    log_params(client, run_id, run["params"])
    points = [Metric(*point) for line in lines for point in line.get("points", [])]
    for start in range(0, len(points), 1000):  # the store's limit for one batch
        client.log_batch(run_id, metrics=points[start : start + 1000])
    for line in lines:
        if "status" in line:
            end = line
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in end["tags"].items()])
    client.set_terminated(run_id, end["status"], end["ended"])
    return str(run_id)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that a full disk or kill -9 cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
