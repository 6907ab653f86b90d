"""Turn the fetched files into checked, de-duplicated rows, prepared/rows/<use>/<split>.jsonl, and report on them.

reports/preprocess holds the report as JSON and as a page. Lengths in it are counted by the tokenizer of model.path; the
embedded model's does not exist yet, so that they are estimated.
"""

from glm.config import EMBEDDED
from glm.data.prepare import prepare
from glm.data.report_page import page
from glm.data.rows import SPLITS
from glm.data.token_counter import TokenizerCounter
from glm.files import replace_folder, write_json, write_text
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    params = stage.params
    counter = None
    if params.model.path != EMBEDDED:
        from glm.models import load_tokenizer

        tokenizer = load_tokenizer(params.model.path, revision=params.model.revision)
        counter = TokenizerCounter(params.data, tokenizer, params.model.path)
    report = prepare(params.data, "prepared/raw", "prepared/rows", counter=counter, progress=stage.progress)
    for datasets in report.values():
        for name, counts in datasets.items():
            stage.log_dataset(name, f"prepared/raw/{name}", split="all", rows=counts["read"])
    with replace_folder("reports/preprocess") as folder:
        write_json(folder / "report.json", report)
        write_text(folder / "report.html", page(report))
    stage.log_artifact("reports/preprocess/report.json")
    stage.log_artifact("reports/preprocess/report.html")
    counts = {}
    for use, datasets in report.items():
        for what in ("read", "kept", *SPLITS, "duplicates", "truncated"):
            counts[f"{use}.{what}"] = sum(counted[what] for counted in datasets.values())
        counts[f"{use}.dropped"] = counts[f"{use}.read"] - counts[f"{use}.kept"]
    return counts


if __name__ == "__main__":
    main("preprocess", run, uses_torch=False)
