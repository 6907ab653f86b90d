"""The MLflow run of a comparison, with the runs of its cells below it."""

import re
import time
from collections.abc import Mapping

from glm.config import Params
from tasks.tracking import open_store, store_uri, warn


def write_results(
    params: Params, run_id: str, values: Mapping[str, float], tags: Mapping[str, str], parent_id: str | None = None
) -> None:
    """Add metrics and tags to a comparison's or a cell's run, and put it below `parent_id`; a failing store is told."""
    from mlflow.entities import Metric, RunTag

    below = {"mlflow.parentRunId": parent_id} if parent_id else {}
    now = int(time.time() * 1000)
    try:
        client, _ = open_store(params.tracking.experiment)
        client.log_batch(
            run_id,
            metrics=[Metric(re.sub(r"[^\w./ -]", "-", name), value, now, 0) for name, value in values.items()],
            tags=[RunTag(name, value) for name, value in (dict(tags) | below).items()],
        )
    except Exception as error:  # whatever a store, a driver or a network may raise
        warn(store_uri(), f"the results are not with the run {run_id}: {error}")


def runs_of_experiments(params: Params, names: list[str]) -> dict[str, str]:
    """The MLflow run of each DVC experiment that the store knows: the newest pipeline run with its name."""
    try:
        client, experiment_id = open_store(params.tracking.experiment)
        found: dict[str, str] = {}
        for name in names:
            query = f"tags.`glmflow.dvc_exp_name` = '{name}' AND tags.`glmflow.step` = 'pipeline'"
            for run in client.search_runs(
                [experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1
            ):
                found[name] = run.info.run_id
        return found
    except Exception as error:
        warn(store_uri(), f"the experiments' runs are not known: {error}")
        return {}
