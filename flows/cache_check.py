"""Whether what DVC takes out of its cache is what it put there.

DVC makes a file of its cache read-only and never reads such a file again to compare it with its name: one that a bad
disk or a power failure has changed would be handed out as the model that dvc.lock names.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tasks.lineage import content_hash


def drop_corrupted(outputs: Mapping[str, str], root: Path, cache: Path) -> list[str]:
    """Remove those of `outputs` (paths in `root` with their md5) that are not what they should be, and return them.

    The broken files of DVC's `cache` that they came from are removed too, so that DVC makes or fetches them again.
    """
    here = {path: md5 for path, md5 in outputs.items() if (root / path).exists()}
    wrong = [path for path, md5 in here.items() if content_hash(root / path) != md5]
    for path in wrong:
        for entry in entries(cache, here[path]):
            if entry.exists() and content_hash(entry) != entry.parent.name + entry.name.removesuffix(".dir"):
                entry.unlink()
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        else:
            (root / path).unlink()
    return wrong


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
