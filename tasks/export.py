"""The policy as a folder for others, models/export: by default merged into the base, which plain transformers loads.

Nothing is sent to the hub here: `export.push_to_hub` gets what becomes the champion (flows/publish.py).

A base that was quantised for training is written with its rounded values in export.dtype, on which the adapters were
trained. A P-Tuning v2 prefix cannot be merged: it lies beside the model, in models/export/prefix, where `load_model`
finds it, and transformers alone does not. The card, README.md, holds nothing that differs between two equal runs.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.base_model import base_source
from tasks.lineage import flatten
from tasks.stage import Stage, main

if TYPE_CHECKING:
    from glm.config import Params
    from glm.export.facts import Facts

OUT = "models/export"
TOLD = ("seed", "model", "data", "sft", "reward", "reward_model")  # sections in the card, besides the algorithm's

logger = logging.getLogger("glm.export")


def run(stage: Stage) -> dict[str, float]:
    from glm.export.writing import export
    from glm.models.lineage import above

    params, options = stage.params, stage.params.export
    base_source()  # the model that models/base points to is still what it was
    facts = facts_of(params)
    exported = export(above(f"models/{params.algorithm}"), OUT, options, facts, name=name_of(params), overwrite=True)
    if exported.prefix:
        logger.warning("export: the prefix lies in %s/prefix, where only glm.models.load_model looks for it", OUT)
    stage.log_model(OUT)
    metrics = {"max_logit_difference": exported.max_logit_difference, "parameters": exported.parameters}
    return metrics | ({} if exported.loss is None else {"loss_increase": exported.loss_increase})


def name_of(params: "Params") -> str:
    """The model's name on its card."""
    return (params.export.push_to_hub or "").rpartition("/")[2] or params.promote.model_name


def facts_of(params: "Params") -> "Facts":
    """What the folders of this run say of how the policy was made."""
    from glm.export.facts import Facts

    path = params.model.path  # of a local folder its name only: the rest is of this machine
    base = {"revision": params.model.revision} | _read("models/base/source.json")
    base["path"] = Path(path).name if Path(path).is_dir() else path
    told = params.model_dump(mode="json", include={*TOLD, "algorithm", params.algorithm})
    return Facts(
        algorithm=params.algorithm,
        sources=_read("prepared/raw/sources.json"),
        rows=_read("reports/preprocess/report.json"),
        base=base,
        metrics=_read("metrics/evaluate.json"),
        parameters=flatten(told),
    )


def _read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


if __name__ == "__main__":
    main("export", run)
