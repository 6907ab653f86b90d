"""What the MLflow store has recorded of how a model was made, for the card of its export."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ruamel.yaml import YAML

from flows.lineage import find_run
from flows.report import read_json
from glm.config import load_params
from glm.errors import InputError
from tasks.lineage import flatten
from tasks.record import FOLDER
from tasks.tracking import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from glm.export.facts import Facts

SECTIONS = ("seed", "model", "data", "sft", "reward", "reward_model")  # told in the card, besides the algorithm's
OF_SFT = ("seed", "model", "data", "sft")


def recorded_facts(target: str) -> "Facts":
    """The facts of models:/NAME@ALIAS, models:/NAME/VERSION, an MLflow run, or a folder that a run made.

    Of a run's SFT model only what concerns it is told. The facts are empty if the store does not know `target`.
    """
    from mlflow.exceptions import MlflowException

    from glm.export.facts import Facts

    client, experiment_id = open_store(load_params().tracking.experiment)
    try:
        run_id, about = find_run(client, experiment_id, target)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(client.download_artifacts(run_id, FOLDER, temporary))
            record = read_json(folder / "record.json")
            values = YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text(encoding="utf-8"))
            metrics = {name: read_json(folder / "metrics" / f"{name}.json") for name in ("evaluate_sft", "evaluate")}
    except (InputError, MlflowException, OSError):
        return Facts()
    algorithm = values["algorithm"]
    who = made_by(client, target, run_id, algorithm)
    sections = OF_SFT if who == "sft" else (*SECTIONS, "algorithm", algorithm)
    return Facts(
        algorithm=who,
        sources=record["sources"],
        rows={use: rows for use, rows in record["rows"].items() if who != "sft" or use in ("sft", "text")},
        base=record["base"] | {"path": display_path(record["base"]["path"])},
        metrics=up_to(metrics["evaluate_sft" if who == "sft" else "evaluate"], who),
        parameters=flatten({name: values[name] for name in sections if name in values}),
        origin={
            "registered as": about.get("version", ""),
            "MLflow run": run_id,
            "commit": record["commit"],
            "not committed": ", ".join(record["uncommitted"]),
        },
    )


def made_by(client: "MlflowClient", target: str, run_id: str, algorithm: str) -> str:
    """Which step made the model that `target` names, sft or the algorithm; `run_id` is the pipeline's run."""
    if target.startswith("models:/"):  # registered: an export
        return algorithm
    if Path(target).exists():
        return "sft" if Path(target).name == "sft" else algorithm
    known = client.get_run(run_id).data.tags
    if f"glmflow.run.{algorithm}" not in known:  # the run ended before
        return "sft"
    return "sft" if target == known.get("glmflow.run.sft") else algorithm


def up_to(metrics: dict[str, float], who: str) -> dict[str, float]:
    """Those of base, SFT and `who`, as far as they are numbers of a model."""
    return {name: value for name, value in metrics.items() if name.partition(".")[0] in ("base", "sft", who)}


def display_path(path: str) -> str:
    """A hub id as it is, of a local folder its name only: the rest is of one machine."""
    return Path(path).name if Path(path).is_absolute() or Path(path).is_dir() else path
