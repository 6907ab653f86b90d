"""The MLflow run of one step: opened in the step's process, below the pipeline's run, and robust against the store.

MLflow itself is imported when the run is opened.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from glm.config import Params
from tasks.tracking import (
    PARENT_RUN,
    PROCESS_TAG,
    create_parent,
    link_steps,
    log_params,
    open_store,
    process_key,
    source_tags,
    store_lock,
    store_uri,
    tidy,
    warn,
)
from tasks.unsent import Journal, Point

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLUSH_SECONDS = 2.0  # points are written together, at most this often
RETRY_SECONDS = 300.0  # how long a failing store is left alone

Write = Callable[["MlflowClient", str], object]  # one thing to write to a run, given its id


class StepRun:
    """The MLflow run of one step.

    Everything to be written goes through `write`. When the store fails, the run, or what is missing of it, is made
    later: once every RETRY_SECONDS, and when the step ends. Meanwhile points and tags are kept in a file too, which a
    later run sends if this one cannot (unsent.py); models, figures and other files are not in it.
    """

    def __init__(self, step: str, params: Params, step_params: dict[str, Any], tags: dict[str, str]) -> None:
        self.step = step
        self.params = params
        self.step_params = step_params
        self.uri = store_uri()
        self.tags = source_tags(f"python -m tasks.{step}") | tags
        self.run_id: str | None = None
        self.parent_id: str | None = None
        self.experiment_id: str | None = None
        self._started = int(time.time() * 1000)
        self._client: MlflowClient | None = None
        self._waiting: deque[Write] = deque()
        self._points: list[Point] = []
        self._journal: Journal | None = None
        self._next_flush = 0.0
        self._warned = False
        self._retry_at = 0.0
        self.write(lambda client, run_id: log_params(client, run_id, step_params))

    def write(self, what: Write) -> None:
        """Do `what(client, run_id)` now, or later if the store fails."""
        self._waiting.append(what)
        self._flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves. They reach the store every few seconds."""
        now = int(time.time() * 1000)
        self._points += [(name, value, now, step) for name, value in values.items()]
        if time.monotonic() >= self._next_flush:
            self._next_flush = time.monotonic() + FLUSH_SECONDS
            self._flush_points()

    def finish(self, status: str, tags: Mapping[str, str]) -> str | None:
        """Write what waits, set the last tags and end the run as FINISHED, FAILED or KILLED. Returns the run's id."""
        from mlflow.entities import RunTag

        self._flush_points()
        self.write(lambda client, run_id: client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()]))
        self._retry_at = 0.0
        if self._journal:
            self._journal.end(status, tags)
        lost = self._flush_last()
        if self.run_id:
            import mlflow

            try:
                mlflow.end_run(status)  # stops the thread of the system metrics too
            except Exception as error:
                lost.append(error)
        if not lost and self._journal:
            self._journal.remove()
        elif self._journal:
            warn(self.uri, f"the next run, or `glmflow sync`, sends the curves in {self._journal.path}: {lost[0]}")
        elif lost:
            warn(self.uri, f"{len(lost)} records of this step are lost: {lost[0]}")
        return self.run_id

    def update_parent(self, status: str, steps: Iterable[str]) -> None:
        """Below plain `dvc repro`: bring the shared parent up to date and end it; a later stage opens it again."""
        if not self._client or not self.parent_id or PARENT_RUN in os.environ:
            return
        try:
            link_steps(self._client, self.parent_id, steps)
            self._client.set_terminated(self.parent_id, status)
        except Exception as error:
            warn(self.uri, f"the parent run was not updated: {error}")

    def _flush_points(self) -> None:
        points, self._points = self._points, []
        for start in range(0, len(points), 1000):  # the store's limit for one batch
            self._waiting.append(partial(_log_metrics, points[start : start + 1000]))
        if self._journal:
            self._journal.points(points)
        self._flush()

    def _flush(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            client, run_id = self._open()
            while self._waiting:
                self._waiting[0](client, run_id)
                self._waiting.popleft()
        except Exception as error:  # whatever a store, a driver or a network may raise
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self._journal:
                self._keep()
            if not self._warned:
                warn(self.uri, f"the step goes on, what is missing is written later: {error}")
                self._warned = True

    def _keep(self) -> None:
        """Begin the file of what the store has not got."""
        run = {
            "run_id": self.run_id,
            "experiment": self.params.tracking.experiment,
            "name": self.step,
            "started": self._started,
            "tags": self.tags,
            "params": self.step_params,
        }
        try:
            self._journal = Journal(run)
            for what in self._waiting:
                if isinstance(what, partial) and what.func is _log_metrics:
                    self._journal.points(what.args[0])
        except OSError as error:  # a full disk, too
            warn(self.uri, f"nor can the curves be kept in a file: {error}")

    def _flush_last(self) -> list[Exception]:
        """Try everything once more, each on its own; returns why the rest is lost."""
        try:
            client, run_id = self._open()
            client.get_run(run_id)  # a dead server is asked once, not for each record
        except Exception as error:
            return [error] * len(self._waiting)
        lost = []
        for what in self._waiting:
            try:
                what(client, run_id)
            except Exception as error:
                lost.append(error)
        self._waiting.clear()
        return lost

    def _open(self) -> tuple["MlflowClient", str]:
        """The client and the id of the run, which is made at the first call that reaches the store."""
        if self._client is None or self.experiment_id is None:
            self._client, self.experiment_id = open_store(self.params.tracking.experiment, self.uri)
            tidy(self._client, self.experiment_id)
        if self.run_id is None:
            self.parent_id = self._find_parent(self._client, self.experiment_id)
            parent = {"mlflow.parentRunId": self.parent_id} if self.parent_id else {}
            run = self._client.create_run(self.experiment_id, self._started, self.tags | parent, run_name=self.step)
            self.run_id = run.info.run_id
            if self._journal:
                self._journal.named(self.run_id)
        import mlflow

        if not mlflow.active_run():  # what logs models and system metrics knows the run by this
            mlflow.start_run(run_id=self.run_id, log_system_metrics=self.params.tracking.system_metrics)
        return self._client, self.run_id

    def _find_parent(self, client: "MlflowClient", experiment_id: str) -> str | None:
        if PARENT_RUN in os.environ:
            return os.environ[PARENT_RUN] or None
        dvc = dvc_process()
        if dvc is None:
            return None
        key = process_key(dvc)
        with store_lock(self.uri):  # two stages of one dvc process may start together
            found = client.search_runs([experiment_id], f"tags.`glmflow.dvc_process` = '{key}'", max_results=1)
            if found:
                client.update_run(found[0].info.run_id, status="RUNNING")
                return found[0].info.run_id
            name = os.environ.get("DVC_EXP_NAME")
            tags = {"glmflow.dvc_process": key, PROCESS_TAG: key} | ({"glmflow.dvc_exp_name": name} if name else {})
            return create_parent(client, experiment_id, self.params, name or "dvc repro", tags, dvc.create_time())


def dvc_process() -> psutil.Process | None:
    """The `dvc` process that started this one; None when started by hand."""
    for process in psutil.Process().parents():
        try:
            command = process.cmdline()[:3]
        except psutil.Error:
            continue
        if any(Path(word).name == "dvc" for word in command):
            return process
    return None


def _log_metrics(points: list[Point], client: "MlflowClient", run_id: str) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])
