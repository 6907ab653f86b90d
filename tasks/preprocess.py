"""Turn the fetched files into checked, de-duplicated rows, prepared/rows/<use>/<split>.jsonl, and count them."""

from glm.data.prepare import prepare
from glm.data.rows import SPLITS
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    report = prepare(stage.params.data, "prepared/raw", "prepared/rows")
    for datasets in report.values():
        for name, counts in datasets.items():
            stage.log_dataset(name, f"prepared/raw/{name}", split="all", rows=counts["read"])
    stage.log_artifact("prepared/rows/report.json")
    counts = {}
    for use, datasets in report.items():
        for what in ("read", "kept", *SPLITS):
            counts[f"{use}.{what}"] = sum(counted[what] for counted in datasets.values())
        counts[f"{use}.dropped"] = counts[f"{use}.read"] - counts[f"{use}.kept"]
    return counts


if __name__ == "__main__":
    main("preprocess", run, uses_torch=False)
