"""The report of a run as one page, reports/<run>.html: results, curves, samples, data, parameters, hashes."""

from html import escape
from pathlib import Path
from typing import Any

from flows.report import STEP_COLUMNS, curves_url, has_curves, read_json, result_rows, sample_rows, step_rows
from glm.config import Params
from glm.data.report_page import sections as data_sections
from glm.files import write_text
from glm.html import document, picture, table
from tasks.lineage import flatten, git_tags, hashes_in_lock, lock_tags


def write_page(path: Path, name: str, root: Path, summary: dict[str, Any], params: Params) -> Path:
    """Write the page of the run `name`, whose files are in `root`; `summary` is what `flows.report.collect` made.

    To be called with `root` as the current folder. A page needs nothing beside it and loads nothing.
    """
    write_text(path, document(f"Run {name}", page_parts(root, summary, params)))
    return path


def page_parts(root: Path, summary: dict[str, Any], params: Params) -> list[str]:
    """The parts of the page in their order."""
    curves = [root / "plots" / f"{step['name']}.csv" for step in summary["steps"]]
    registered = [f"<p>Registered as {escape(summary['registered'])}.</p>"] if summary["registered"] else []
    return [
        *registered,
        "<h2>Before and after, on the test split</h2>",
        table(["", *summary["models"].values()], result_rows(summary)),
        "<h2>Steps</h2>",
        table([*STEP_COLUMNS, "MLflow run"], [[*row, run_id] for row, run_id in _steps_with_runs(summary)]),
        "<h2>Curves</h2>",
        *(picture(curves_url(path), f"Curves of {path.stem}") for path in curves if has_curves(path)),
        "<h2>Samples</h2>",
        table(["prompt", *summary["models"].values()], sample_rows(summary)),
        "<h2>Data</h2>",
        *data_sections(read_json(root / "reports" / "preprocess" / "report.json")),
        "<h2>Parameters</h2>",
        table(["name", "value"], [[key, str(value)] for key, value in flatten(params.model_dump()).items()]),
        "<h2>Where it comes from</h2>",
        table(["", ""], list((git_tags() | lock_tags()).items())),
        table(["output", "md5"], list(hashes_in_lock(root / "dvc.lock").items())),
    ]


def _steps_with_runs(summary: dict[str, Any]) -> list[tuple[list[str], str]]:
    return [(row, step.get("run_id") or "") for row, step in zip(step_rows(summary), summary["steps"], strict=True)]
