"""Checkpoint folders: finding their files, checking them, and reading them tensor by tensor.

A `Checkpoint` holds one weight file open at a time and hands out copies, so that loading needs the memory of the model
plus one shard. `LazyTensor` gives such reads the face of a safetensors slice, which is what transformers'
`from_pretrained` expects to find in a state dict.
"""

import json
import pickle
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm.config import HUB_ID
from glm.errors import InputError

# File names in the order in which they are looked for, the same as transformers'.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_TEXT_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}  # safetensors'


def local_folder(path_or_hub_id: str, revision: str | None = None) -> Path:
    """Give the folder of a local path, or download a hub repository's files (no code) and give that folder.

    Raises InputError if it is neither an existing folder nor written like a hub id.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(path_or_hub_id):
        raise InputError(f"{path_or_hub_id}: no such folder")
    try:
        wanted = [*_TEXT_FILES, "*.safetensors"]
        found = Path(snapshot_download(path_or_hub_id, revision=revision, allow_patterns=wanted))
        if not any(found.glob("*.safetensors")):
            wanted = [*_TEXT_FILES, "*.bin"]
            found = Path(snapshot_download(path_or_hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises several kinds: offline, unknown repository, unknown revision
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path_or_hub_id}: no such folder, and not to be had from the hub: {reason}") from error
    return found


def follow_pointer(folder: str | Path) -> tuple[str, str | None]:
    """The (folder or hub id, revision) that `folder`/source.json names; `folder` itself where there is no such file."""
    pointer = Path(folder, "source.json")
    if not pointer.exists():
        return str(folder), None
    source = json.loads(pointer.read_text(encoding="utf-8"))
    return source["path"], source["revision"]


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder; InputError if it is missing or not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; a model folder has a config.json and its weights") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a JSON {type(config).__name__}, not an object")
    return config


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands, and what it is, without its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' spelling: F16, I8, ...


class Checkpoint:
    """The weights of a folder (`*.safetensors`, or `*.bin` read with `weights_only=True`), or of one such file.

    `tensors` maps every name to its place, shape and dtype. Making a Checkpoint reads the head of every file; it raises
    InputError naming the file for a missing or truncated shard, and for a `.bin` that holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self._lock = threading.Lock()
        self._shard: tuple[Path, dict[str, Any]] | None = None
        for file, promised in _weight_files(path).items():
            held = _inventory(file)
            absent = sorted(promised - held.keys())
            if absent:
                raise InputError(f"{file}: lacks {absent[0]}, which the index promises ({len(absent)} such tensors)")
            self.tensors.update(held)

    def read(self, name: str, rows: slice | None = None, change: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Read a tensor, or a range of its rows, into memory. Safe to call from several threads.

        `change` makes the result from the tensor in the mapped file, of which it must not keep a view.
        """
        file = self.tensors[name].file
        with self._lock:
            if self._shard is None or self._shard[0] != file:
                self._shard = None  # let go of the shard before the next one is mapped
                self._shard = (file, _open(file))
            return change(self._shard[1][name][... if rows is None else rows])

    def close(self) -> None:
        """Let go of the file that is open."""
        self._shard = None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as a safetensors slice is.

    `rows` selects a range of rows; `change` is how they are copied, to `dtype` if it is not the stored one.
    """

    checkpoint: Checkpoint
    name: str
    rows: slice | None = None
    change: Callable[[Tensor], Tensor] = torch.clone
    dtype: str | None = None

    def __getitem__(self, index: Any) -> Tensor:
        return self.checkpoint.read(self.name, self.rows, self.change)[index]

    def get_dtype(self) -> str:
        return self.dtype or self.checkpoint.tensors[self.name].dtype


def _weight_files(path: Path) -> dict[Path, set[str]]:
    """The weight files at `path`, each with the tensors that an index promises in it."""
    if path.is_file():
        return {path: set()}
    for name in WEIGHT_FILES:
        file = path / name
        if not file.exists():
            continue
        if not name.endswith(".index.json"):
            return {file: set()}
        try:
            weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise InputError(f"{file}: not an index of weights (a JSON object with a weight_map)") from error
        shards: dict[Path, set[str]] = {}
        for tensor, shard in weight_map.items():
            if Path(shard).name != shard:
                raise InputError(f"{file}: names the shard {shard!r}, which is not a file of the same folder")
            shards.setdefault(path / shard, set()).add(tensor)
        for shard_path in shards:
            if not shard_path.exists():
                raise InputError(f"{shard_path}: missing, though {name} says that it holds weights")
        return shards
    raise InputError(f"{path}: no weights; looked for {', '.join(WEIGHT_FILES)}")


def _open(file: Path) -> dict[str, Any]:
    """Map a weight file: names to tensors or safetensors slices, whose values are read when they are indexed."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _inventory(file: Path) -> dict[str, Stored]:
    try:
        content = _open(file)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file}: refused: it holds pickled objects other than tensors ({_cause(error)})") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{file}: truncated or damaged: {_cause(error)}") from error
    if file.suffix == ".safetensors":
        return {name: Stored(file, tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in content.items()}
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(f"{file}: not a state dict, a mapping of names to tensors")
    return {
        name: Stored(file, tuple(tensor.shape), _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in content.items()
    }


def _cause(error: Exception) -> str:
    """The telling line of torch's long messages about files."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    telling = [line for line in lines if line.startswith(("Trying to load", "Unsupported"))]
    return (telling or lines)[0].split(". ")[0].rstrip(".")
