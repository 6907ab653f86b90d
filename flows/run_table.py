"""What MLflow knows of the pipeline's runs, for pages that lay them side by side and draw their curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows.cells import differences
from flows.report import ROWS
from glm.config import Params
from tasks.tracking import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

Points = dict[int, dict[str, float]]  # by step, then by name


@dataclass(frozen=True)
class PipelineRun:
    """One run of the whole pipeline, or of a cell of a comparison."""

    run_id: str
    name: str
    status: str
    started: str
    seconds: float | None
    params: dict[str, str]
    metrics: dict[str, float]

    def result(self, metric: str) -> float | None:
        """A metric of `evaluate` of the policy; where the run ended before, of SFT."""
        algorithm = self.params.get("algorithm", "")
        names = (f"evaluate.{algorithm}.{metric}", f"evaluate_sft.sft.{metric}")
        return next((self.metrics[name] for name in names if name in self.metrics), None)


def pipeline_runs(params: Params, most: int = 100) -> list[PipelineRun]:
    """The runs in the store, the newest first."""
    client, experiment_id = open_store(params.tracking.experiment)
    found = client.search_runs(
        [experiment_id], "tags.`glmflow.step` = 'pipeline'", order_by=["start_time DESC"], max_results=most
    )
    return [_pipeline_run(run) for run in found]


def _pipeline_run(run: Any) -> PipelineRun:
    info = run.info
    return PipelineRun(
        info.run_id,
        info.run_name,
        info.status,
        datetime.fromtimestamp(info.start_time / 1000, UTC).strftime("%Y-%m-%d %H:%M"),
        (info.end_time - info.start_time) / 1000 if info.end_time else None,
        dict(run.data.params),
        {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")},
    )


def result_table(runs: Sequence[PipelineRun]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows: name, start, state, seconds, algorithm, and the results that some run has."""
    metrics = [name for name in ROWS if any(run.result(name) is not None for run in runs)]
    head = ["run", "started", "state", "seconds", "algorithm", *metrics]
    rows = []
    for run in runs:
        results = [run.result(name) for name in metrics]
        seconds = None if run.seconds is None else round(run.seconds)
        values = [
            None if value is None else round(value, ROWS[name][1] + 1)
            for name, value in zip(metrics, results, strict=True)
        ]
        rows.append([run.name, run.started, run.status, seconds, run.params.get("algorithm"), *values])
    return head, rows


def difference_table(runs: Sequence[PipelineRun]) -> list[list[str]]:
    """The parameters in which runs differ: name, then each run's value."""
    differ = differences({run.run_id: run.params for run in runs})
    names = next(iter(differ.values()), {})
    return [[name, *(run.params.get(name, "–") for run in runs)] for name in names]


def step_runs(params: Params, run_id: str) -> dict[str, str]:
    """The MLflow run of each step that a pipeline's run executed, in the order in which they began."""
    client, experiment_id = open_store(params.tracking.experiment)
    below = f"tags.`mlflow.parentRunId` = '{run_id}'"
    return {
        run.data.tags.get("glmflow.step", run.info.run_name): run.info.run_id
        for run in client.search_runs([experiment_id], below, order_by=["start_time ASC"])
    }


def points(params: Params, run_id: str) -> Points:
    """The curves of a step's run: what was measured more than once."""
    client, _ = open_store(params.tracking.experiment)
    found: Points = {}
    for name in client.get_run(run_id).data.metrics:
        if not name.startswith("system/") and len(history := _history(client, run_id, name)) > 1:
            for step, value in history.items():
                found.setdefault(step, {})[name] = value
    return found


def _history(client: "MlflowClient", run_id: str, name: str) -> dict[int, float]:
    return {point.step: point.value for point in client.get_metric_history(run_id, name)}
