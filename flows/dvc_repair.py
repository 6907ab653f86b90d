"""What a bad disk or a sudden end leaves in DVC's folders, and DVC itself does not see to.

DVC makes a file of its cache read-only and never reads such a file again to compare it with its name: one that has
changed would be handed out as the model that dvc.lock names. dvc.lock itself, which DVC writes in place, its run cache
and its list of locks may be cut off.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from glm.files import write_json
from tasks.lineage import content_hash


def drop_corrupted(outputs: Mapping[str, str], root: Path, cache: Path) -> list[str]:
    """Remove those of `outputs` (paths in `root` with their md5) that DVC restored from broken files, and return them.

    The broken files of DVC's `cache` are removed too, so that DVC makes or fetches them again. A file is read once, and
    again when its inode, size or time of change differs; `cache/verified.json` remembers.
    """
    memory = cache / "verified.json"
    verified: dict[str, list[int]] = {}
    with suppress(OSError, ValueError):
        verified = json.loads(memory.read_text(encoding="utf-8"))
    known = dict(verified)
    here = {path: md5 for path, md5 in outputs.items() if (root / path).exists()}
    wrong = [path for path, md5 in here.items() if broken_entries(cache, md5, verified)]
    for path in wrong:
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        else:
            (root / path).unlink()
    if verified != known:
        write_json(memory, {name: state for name, state in verified.items() if (cache / name).exists()})
    return wrong


def broken_entries(cache: Path, md5: str, verified: dict[str, list[int]]) -> list[Path]:
    """Remove the files of the cache behind an output that are not what their names say, and return them.

    `verified` are the states in which files were found sound; it is added to.
    """
    broken = []
    for entry in entries(cache, md5):
        if not entry.exists():
            continue
        name, now = str(entry.relative_to(cache)), entry.stat()
        state = [now.st_ino, now.st_size, now.st_mtime_ns]
        if verified.get(name) == state:
            continue
        if content_hash(entry) == entry.parent.name + entry.name.removesuffix(".dir"):
            verified[name] = state
        else:
            entry.unlink()
            broken.append(entry)
    return broken


def drop_corrupted_lists(outputs: Mapping[str, str], cache: Path) -> bool:
    """Remove the lists of folders among `outputs` that are not what their names say. True: there was one.

    DVC does not read such a list, and does not write it again either: `dvc commit` after this does.
    """
    lists = [cached(cache, md5) for md5 in outputs.values() if md5.endswith(".dir")]
    wrong = [path for path in lists if path.exists() and content_hash(path) + ".dir" != path.parent.name + path.name]
    for path in wrong:
        path.unlink()
    return bool(wrong)


def entries(cache: Path, md5: str) -> Iterator[Path]:
    """The files of the cache that hold an output: its own, or of a folder its list and all files in it."""
    if md5.endswith(".dir"):
        with suppress(OSError, ValueError):
            for file in json.loads(cached(cache, md5).read_text(encoding="utf-8")):
                yield cached(cache, file["md5"])
    yield cached(cache, md5)


def cached(cache: Path, md5: str) -> Path:
    """Where DVC's cache keeps a file of this content, or the list of a folder's files."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def drop_corrupted_runs(cache: Path) -> list[str]:
    """Remove the entries of DVC's run cache whose content is not what their name says. Returns them.

    DVC does so itself with what is no YAML. One that was cut off and still is YAML makes it fail, each time again.
    """
    from dvc.stage.cache import _get_cache_hash

    wrong = []
    for path in sorted(cache.glob("runs/*/*/*")):
        try:
            sound = _get_cache_hash(YAML(typ="safe").load(path.read_bytes())) == path.name
        except (YAMLError, ValueError, AttributeError):  # no YAML, no UTF-8, no mapping
            sound = False
        if not sound:
            path.unlink()
            wrong.append(f"the corrupted {path.relative_to(cache.parent)}")
    return wrong


def drop_corrupted_lock_file(root: Path) -> list[str]:
    """Move a dvc.lock that was cut off to .dvc/tmp. Returns what was moved.

    DVC empties the file and writes it anew after each stage: a kill between the two leaves one that stops all its
    commands. Nothing is lost with it, since the run cache knows all that it said. A file with the marks of a merge is
    left to whoever merges.
    """
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    path = root / "dvc.lock"
    if not path.exists() or b"\n<<<<<<<" in path.read_bytes():
        return []
    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(path.read_bytes()))
    except (YAMLError, ValueError, Invalid):  # no YAML, no UTF-8, not all keys
        path.replace(root / ".dvc" / "tmp" / "dvc.lock.corrupted")
        return ["the corrupted dvc.lock (moved to .dvc/tmp/dvc.lock.corrupted)"]
    return []


def drop_dead_locks(root: Path) -> list[str]:
    """Remove from DVC's list of locks, .dvc/tmp/rwlock, those of processes that are gone. Returns them.

    DVC takes a number that another program has got since, as after a restart or in a container, for its own process
    and would wait for it; and a list that was cut off stops all its commands.
    """
    from dvc.repo import Repo
    from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError, _edit_rwlock

    with Repo(str(root)) as repo:
        folder = str(repo.tmp_dir)
        try:
            with _edit_rwlock(folder, repo.fs, repo.config["core"].get("hardlink_lock", False)) as locks:
                holders = [one for found in locks["read"].values() for one in found] + list(locks["write"].values())
                dead = [holder for holder in holders if not is_dvc(holder["pid"])]
                read = {path: [one for one in found if one not in dead] for path, found in locks["read"].items()}
                locks["read"] = {path: found for path, found in read.items() if found}
                locks["write"] = {path: one for path, one in locks["write"].items() if one not in dead}
        except (RWLockFileCorruptedError, RWLockFileFormatError):
            Path(folder, "rwlock").unlink()
            return ["the corrupted .dvc/tmp/rwlock"]
    return sorted({f"the lock of `{holder['cmd']}` (process {holder['pid']}, gone)" for holder in dead})


def is_dvc(pid: int) -> bool:
    """Is this process one of DVC?"""
    try:
        words: list[Any] = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return any(Path(word).name == "dvc" for word in words[:3])
