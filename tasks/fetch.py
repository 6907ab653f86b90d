"""Bring every dataset that params.yaml names into prepared/raw, unchanged, and check its hash."""

from glm.data.registry import fetch
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    data = stage.params.data
    sources = fetch([*data.text, *data.sft, *data.reward, *data.ppo], data.dataset_dir, "prepared/raw")
    return {"datasets": len(sources), "files": sum(len(source["sha256"]) for source in sources.values())}


if __name__ == "__main__":
    main("fetch", run, uses_torch=False)
