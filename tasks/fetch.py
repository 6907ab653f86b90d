"""Bring every dataset that params.yaml names into prepared/raw, unchanged, and check its hash.

A local file that DVC tracks must be the version that its .dvc file records.
"""

from pathlib import Path

from ruamel.yaml import YAML

from glm.data.registry import find, read_registry
from glm.data.rows import USES
from glm.data.sources import fetch
from glm.errors import InputError
from tasks.lineage import content_hash
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    data = stage.params.data
    names = [name for use in USES for name in getattr(data, use)]
    registry = read_registry(data.dataset_dir)
    for name in dict.fromkeys(names):
        if file_name := find(registry, name, data.dataset_dir).file_name:
            check_tracked(name, Path(data.dataset_dir), file_name)
    sources = fetch(names, data.dataset_dir, "prepared/raw")
    return {"datasets": len(sources), "files": sum(len(source["sha256"]) for source in sources.values())}


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
    found = content_hash(tracked)
    if found != recorded:
        raise InputError(
            f"dataset {name!r}: {tracked} was altered: its md5 is {found}, {pointer} records {recorded}. "
            f"`dvc checkout --force {pointer}` brings the recorded version back, `dvc add {tracked}` accepts this one"
        )


if __name__ == "__main__":
    main("fetch", run, uses_torch=False)
