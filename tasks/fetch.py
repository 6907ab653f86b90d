"""Bring every dataset that params.yaml names into prepared/raw, unchanged, and check its hash."""

from glm.data.rows import USES
from glm.data.sources import fetch
from tasks.inputs import check_datasets
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    data = stage.params.data
    check_datasets(data)
    names = [name for use in USES for name in getattr(data, use)]
    sources = fetch(names, data.dataset_dir, "prepared/raw")
    return {"datasets": len(sources), "files": sum(len(source["sha256"]) for source in sources.values())}


if __name__ == "__main__":
    main("fetch", run, uses_torch=False)
