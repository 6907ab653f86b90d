"""Are the things that params.yaml names there? Asked before a run starts, so that it does not fail after an hour."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from glm.config import EMBEDDED, HUB_ID, Data, Params
from glm.data.registry import read_registry
from glm.data.rows import USES
from glm.data.sources import local_files
from glm.errors import InputError
from glm.files import write_json
from tasks import STEPS
from tasks.launch import check_engine
from tasks.lineage import content_hash
from tasks.tracking import main_checkout


def check_inputs(params: Params, steps: Sequence[str] = STEPS) -> None:
    """Look for every dataset's registry entry and local files, the model's folder, and the engine of several processes.

    Nothing is downloaded.

    `steps` are those that will run: what they do not need may be left out.

    Raises:
        InputError: names the first thing that is missing, and what would be right.
    """
    for step, use in (("reward", "reward"), ("policy", "ppo")):
        if step in steps and not getattr(params.data, use):
            raise InputError(
                f"data.{use}: empty, but the step {step} needs rows: name a dataset, or end the run before"
            )
    check_engine(params.launch)
    check_datasets(params.data)
    path = params.model.path
    if path == EMBEDDED:
        if not params.data.text:
            raise InputError("data.text: empty, but model.path is 'embedded', whose base model learns from plain text")
    elif Path(path).is_dir():
        if not Path(path, "config.json").is_file():
            raise InputError(f"model.path: {path} has no config.json, so it is no model folder")
    elif not HUB_ID.fullmatch(path):
        raise InputError(f"model.path: {path!r} is neither 'embedded', nor a folder, nor a hub id such as owner/name")


def check_datasets(data: Data) -> None:
    """Look for every dataset's registry entry and local files, and compare what DVC tracks with what it recorded.

    Raises:
        InputError: names the first one that is missing or altered, and what would be right.
    """
    names = [name for use in USES for name in getattr(data, use)]
    for name, entry in read_registry(data.dataset_dir, names).items():
        entry.check_placeholders(name, data.placeholders)
        if entry.file_name:
            check_tracked(name, Path(data.dataset_dir), entry.file_name)
        local_files(name, entry, data.dataset_dir)


def check_tracked(name: str, dataset_dir: Path, file_name: str) -> None:
    """Compare a local source with the .dvc file of it, or of a folder that holds it, if there is one.

    Raises:
        InputError: it is tracked and missing, or differs; the message has the command that repairs it.
    """
    path = dataset_dir / file_name
    for tracked in (path, *path.parents):
        pointer = Path(f"{tracked}.dvc")
        if pointer.is_file():
            break
        if tracked == dataset_dir:
            return
    else:
        return
    recorded = YAML(typ="safe", pure=True).load(pointer.read_text(encoding="utf-8"))["outs"][0]["md5"]
    if not tracked.exists():
        raise InputError(f"dataset {name!r}: {tracked} is tracked by DVC but not here: `dvc pull {pointer}` brings it")
    found = known_hash(tracked)
    if found != recorded:
        raise InputError(
            f"dataset {name!r}: {tracked} was altered: its md5 is {found}, {pointer} records {recorded}. "
            f"`dvc checkout --force {pointer}` brings the recorded version back, `dvc add {tracked}` accepts this one"
        )


def known_hash(path: Path) -> str:
    """`content_hash` of a file or folder, read again only where inode, size or time of change differ, as DVC does it.

    A run asks three times for data: before it starts, in its flow, and when the files are fetched; and three times for
    its export, to register and to record it.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    state = [[str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns] for file in files for stat in [file.stat()]]
    seen = hashlib.md5(json.dumps(state).encode()).hexdigest()
    memory = main_checkout() / ".cache" / "hashes" / f"{hashlib.md5(str(path.absolute()).encode()).hexdigest()}.json"
    if memory.exists():
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["seen"] == seen:
            return known["md5"]
    found = content_hash(path)
    write_json(memory, {"path": str(path.absolute()), "seen": seen, "md5": found})
    return found
