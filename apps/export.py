"""Exporting any model that has a name, with what the MLflow store knows of how it was made."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.models import resolve
from glm.config import Export, validate_params

if TYPE_CHECKING:
    from glm.export.writing import Exported
    from glm.models.lineage import Lineage


def export_model(
    name: str, out: str | Path, values: dict[str, Any], adapters: Sequence[str] = (), *, overwrite: bool = False
) -> "tuple[Exported, str]":
    """Export the model `name` under `adapters` to the folder `out`, and send it to the hub if that is asked for.

    `values` are names of the section `export` of params.yaml; without a dtype it is the one in which the model is
    stored. Returns what was written, and the address of the commit on the hub ("" if nothing was sent).

    Raises:
        InputError: no such model, wrong values, or whatever `glm.export.writing.export` and the hub refuse.
    """
    options = read_options(values)
    source = source_of_name(name, adapters)
    from transformers.utils import logging

    from flows.card_facts import recorded_facts
    from glm.export.hub import check_access, push
    from glm.export.writing import export

    if options.push_to_hub:
        check_access(options.push_to_hub)
    if "dtype" not in values:
        options = options.model_copy(update={"dtype": source.dtype or stored_dtype(source)})
    title = (options.push_to_hub or str(out)).rpartition("/")[2]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about what peft calls in transformers
        exported = export(source, out, options, recorded_facts(name), name=title, overwrite=overwrite)
    sent = push(exported.folder, options.push_to_hub, options.private) if options.push_to_hub else ""
    return exported, sent


def read_options(values: dict[str, Any]) -> Export:
    """The section `export` of params.yaml with these values.

    Raises:
        InputError: a line for each that is not right.
    """
    return validate_params({"export": values}, "glmflow export").export


def source_of_name(name: str, adapters: Sequence[str]) -> "Lineage":
    """Base and adapters behind a name, the base being a folder with weights or a hub id."""
    from glm.models.lineage import FILE_NAME, Lineage, above, source_of

    found = resolve(name, adapters)
    if Path(name, FILE_NAME).exists():
        source = above(name)
        source = replace(source, adapters=(*source.adapters, *adapters))
    else:
        source = Lineage(
            found.base,
            found.revision,
            quantization=found.quantization,
            double_quantization=found.double_quantization,
            adapters=found.adapters,
        )
    base, revision = source_of(source.base, source.revision)
    return replace(source, base=base, revision=revision)


def stored_dtype(source: "Lineage") -> str:
    """The dtype that the base's config.json names; float32 without one."""
    from glm.models.checkpoint import local_folder, read_config

    config = read_config(local_folder(source.base, source.revision))
    return config.get("dtype") or config.get("torch_dtype") or "float32"
