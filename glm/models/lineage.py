"""What a trained adapter or model stands on, so that a folder is enough to load it and nobody lists what lies beneath.

    lineage = Lineage(base="models/base", quantization="nf4")
    below, start = above("models/sft").starting("lora", resume=True)
    write_lineage("models/reward", temporary_folder, "lora", below)
    load_model("models/reward")                      # follows it

`stands_on.json` holds the base with its revision, dtype and quantisation, and the adapters beneath in their order, each
with a hash. Local paths are relative to the folder that the file is in, so that a project can be moved.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm.config import Method
from glm.errors import InputError
from glm.files import write_json
from glm.models.checkpoint import follow_pointer
from glm.models.methods import method_of

FILE_NAME = "stands_on.json"
WHOLE_FILE = 2**26  # bytes up to which all of a file is hashed; of larger ones both ends, for they are models


@dataclass(frozen=True)
class Lineage:
    """A base model and the adapters on it, in the order in which they are applied.

    `base` is a folder, a folder with a source.json that points to one, or a hub id.
    """

    base: str
    revision: str | None = None
    dtype: str | None = None
    quantization: str = "none"
    double_quantization: bool = True
    adapters: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The artifacts, base left out, in order; a whole model that was trained counts as the first one."""
        first = chain(self.base) if Path(self.base, FILE_NAME).exists() else ()
        return (*first, *self.adapters)

    def starting(self, method: Method, *, resume: bool) -> "tuple[Lineage, Path | None]":
        """(what a training by `method` stands on, the adapter that it goes on with).

        With `resume` the last adapter is trained further if it is of the same method, else a fresh one is trained on
        it: the two meanings of the reference's resume_lora_training. Of a whole model nothing has to be copied.
        """
        if resume and self.adapters and method_of(Path(self.adapters[-1])) == method:
            return replace(self, adapters=self.adapters[:-1]), Path(self.adapters[-1])
        return self, None

    def check(self, method: Method) -> None:
        """Refuse to train `method` on this where it could not be saved or loaded.

        Raises:
            InputError: a second prefix, or a whole model under a prefix.
        """
        prefixes = [adapter for adapter in self.adapters if method_of(Path(adapter)) == "p_tuning"]
        if prefixes and method in ("p_tuning", "full"):
            raise InputError(
                f"method {method} on {prefixes[-1]}: a prefix cannot be merged into weights, and a model takes one: "
                "choose lora or freeze, or go on training the prefix"
            )


def above(folder: str | Path) -> Lineage:
    """The lineage of whatever is put on top of the artifact in `folder`."""
    _, below = read_lineage(folder)
    if below is None:
        return Lineage(base=str(folder))
    return replace(below, adapters=(*below.adapters, str(folder)))


def write_lineage(place: str | Path, folder: Path, method: Method, below: Lineage) -> None:
    """Write stands_on.json into `folder`, which will be moved to `place`, for what `method` has trained on `below`."""
    place = Path(place)
    record: dict[str, Any] = {"method": method, "dtype": below.dtype, "adapters": []}
    if method == "full":
        record["base"] = None
    else:
        record |= {
            "base": {"path": _from(place, below.base), "revision": below.revision, "hash": folder_hash(below.base)},
            "quantization": below.quantization,
            "double_quantization": below.double_quantization,
            "adapters": [{"path": _from(place, path), "hash": folder_hash(path)} for path in below.adapters],
        }
    write_json(folder / FILE_NAME, record)


def read_lineage(folder: str | Path) -> tuple[Method, Lineage | None]:
    """(method, what it stands on) of the artifact in `folder`; a whole model stands on nothing.

    Raises:
        InputError: there is no stands_on.json, or something beneath is missing or no longer what it was.
    """
    path = Path(folder, FILE_NAME)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; without it nobody knows what the adapter stands on") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if record["base"] is None:
        return record["method"], None
    beneath = [_found(path, entry) for entry in (record["base"], *record["adapters"])]
    return record["method"], Lineage(
        base=beneath[0],
        revision=record["base"]["revision"],
        dtype=record["dtype"],
        quantization=record["quantization"],
        double_quantization=record["double_quantization"],
        adapters=tuple(beneath[1:]),
    )


def chain(folder: str | Path) -> tuple[str, ...]:
    """The parts of what the artifact in `folder` stands on, and the artifact itself."""
    _, below = read_lineage(folder)
    return (*(below.parts if below is not None else ()), str(folder))


def folder_hash(path: str | Path) -> str | None:
    """A hash of the files in a folder (of large ones: size and both ends), or of one file; None for a hub id.

    Of a folder with a source.json it is the hash of the latter, which holds the hashes of the model's files.
    """
    path = Path(path)
    if not path.exists():
        return None
    pointer = path / "source.json"
    files = [path] if path.is_file() else [pointer] if pointer.exists() else sorted(path.iterdir())
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            continue
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(WHOLE_FILE))
            if file.stat().st_size > WHOLE_FILE:
                stream.seek(-WHOLE_FILE, os.SEEK_END)
                digest.update(stream.read())
    return digest.hexdigest()


def source_of(base: str, revision: str | None) -> tuple[str, str | None]:
    """(folder or hub id, revision) of a base, past a source.json."""
    path, pinned = follow_pointer(base)
    return path, pinned or revision


def base_of(folder: str, revision: str | None = None) -> tuple[str, str | None]:
    """(folder or hub id, revision) of the model that an artifact or a pointer in `folder` leads to, else `folder`."""
    if Path(folder, FILE_NAME).exists():
        _, below = read_lineage(folder)
        if below is not None:
            return base_of(below.base, below.revision)
    return source_of(folder, revision)


def _from(place: Path, path: str) -> str:
    """`path` as seen from the folder `place`, if it is a relative one of this machine; else as it is."""
    if not Path(path).exists() or Path(path).is_absolute():
        return path
    return Path(os.path.relpath(path, place)).as_posix()


def _found(record: Path, entry: dict[str, Any]) -> str:
    if entry["hash"] is None:
        return entry["path"]  # a hub id
    path = os.path.normpath(record.parent / entry["path"])
    if (found := folder_hash(path)) != entry["hash"]:
        state = "missing" if found is None else "no longer what it was"
        raise InputError(f"{record}: {path}, which this was trained on, is {state}: restore it, or train this again")
    return path
