"""The base model that every later step loads from models/base."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import Params
from glm.errors import InputError
from glm.files import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "models/base"


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


def load_base(params: Params) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The base model in `params.model.dtype`, on the GPU where there is one, and its tokenizer."""
    import torch

    from glm.models import load_model

    path, revision = base_source()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(path, dtype=params.model.dtype, device=device, revision=revision), load_base_tokenizer()


def load_base_tokenizer() -> "PreTrainedTokenizerBase":
    """The base model's tokenizer."""
    from glm.models import load_tokenizer

    path, revision = base_source()
    return load_tokenizer(path, revision=revision)
