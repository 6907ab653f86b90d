"""The base model that every later step loads from models/base."""

import json
import os
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import Params
from glm.errors import InputError
from glm.files import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glm.models.lineage import Lineage

BASE = "models/base"
ADAPTERS = "adapters.json"  # in BASE


def describe(path: str, revision: str | None) -> dict[str, Any]:
    """What models/base/source.json says of a real model: where it is, and size and sha256 of each of its files.

    Raises:
        InputError: no such folder or hub model, or it has no config.
    """
    from glm.models.checkpoint import local_folder, read_config

    folder = local_folder(path, revision)
    read_config(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return {
        "path": str(folder.resolve()) if Path(path).is_dir() else path,
        "revision": revision,
        "files": {file.name: {"size": file.stat().st_size, "sha256": file_hash(file, "sha256")} for file in files},
    }


def base_source() -> tuple[str, str | None]:
    """(folder or hub id, revision) of the base model, checked to be what the base step saw.

    Raises:
        InputError: the base step has not run, or files of the model changed since.
    """
    from glm.models.checkpoint import follow_pointer

    path, revision = follow_pointer(BASE)
    if path == BASE:
        if not Path(BASE, "config.json").exists():
            raise InputError(f"{BASE}: no base model; run `dvc repro base` first")
        return path, revision
    folder = Path(path)
    files = json.loads(Path(BASE, "source.json").read_text(encoding="utf-8"))["files"]
    for name, seen in files.items() if folder.is_dir() else ():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size != seen["size"]:
            raise InputError(
                f"{file}: {'missing' if size is None else f'{size} bytes'}, but {seen['size']} bytes when the base "
                "step recorded it; restore it, or accept the new model by `dvc repro -f -s base`"
            )
    return path, revision


def foundation(params: Params) -> "Lineage":
    """What the first training stands on: models/base under `model.adapters`, checked to be what the base step saw.

    Raises:
        InputError: the base step has not run, or files of the model or the adapters changed since.
    """
    from glm.models.lineage import Lineage, folder_hash

    base_source()
    recorded = Path(BASE, ADAPTERS)
    seen = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else []
    for adapter in seen:
        if folder_hash(adapter["path"]) != adapter["hash"]:
            raise InputError(
                f"model.adapters: {adapter['path']} is no longer what the base step recorded; restore it, or accept "
                "the new one by `dvc repro -f -s base`"
            )
    return Lineage(
        base=BASE,
        dtype=params.model.dtype,
        quantization=params.model.quantization,
        double_quantization=params.model.double_quantization,
        adapters=tuple(adapter["path"] for adapter in seen),
    )


def describe_adapters(adapters: list[str]) -> list[dict[str, str | None]]:
    """What models/base/adapters.json says of model.adapters: their paths and hashes, in their order.

    Raises:
        InputError: one of them is missing, or no adapter.
    """
    from glm.models.checkpoint import local_folder
    from glm.models.lineage import folder_hash
    from glm.models.methods import method_of

    described = []
    for adapter in adapters:
        path = os.path.normpath(adapter) if Path(adapter).exists() else adapter
        if method_of(local_folder(path)) == "full":
            raise InputError(f"model.adapters: {adapter} is a whole model: give it as model.path")
        described.append({"path": path, "hash": folder_hash(path)})
    return described


def load_on(lineage: "Lineage") -> "PreTrainedModel":
    """The model that `lineage` describes, on the GPU where there is one."""
    import torch

    from glm.models import load_model

    return load_model(
        lineage.base,
        adapters=lineage.adapters,
        dtype=lineage.dtype,
        device="cuda" if torch.cuda.is_available() else "cpu",
        quantization=lineage.quantization,
        double_quantization=lineage.double_quantization,
        revision=lineage.revision,
    )


def load_base(params: Params) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The base model under `model.adapters`, on the GPU where there is one, and its tokenizer."""
    return load_on(foundation(params)), load_base_tokenizer()


def load_shared(params: Params, *chains: tuple[str, ...]) -> "tuple[PreTrainedModel, tuple[str, ...]]":
    """(a model on which all these chains of artifacts can be put, the parts that they share, which it holds).

    On a quantised base it is the base alone, since nothing can be merged into that.
    """
    from glm.models.lineage import above

    lineage = foundation(params)
    if params.model.quantization != "none":
        return load_on(replace(lineage, adapters=())), ()
    shared = tuple(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*chains, strict=False)))
    if len(shared) <= len(lineage.adapters):  # nothing but the user's own adapters
        return load_on(replace(lineage, adapters=shared)), shared
    return load_on(above(shared[-1])), shared


def load_base_tokenizer() -> "PreTrainedTokenizerBase":
    """The base model's tokenizer."""
    from glm.models import load_tokenizer

    path, revision = base_source()
    return load_tokenizer(path, revision=revision)
