"""What a run comes to: a table before and after, answers side by side, what to type next; and the same for Prefect."""

import base64
import csv
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.progress import Step, clock
from glm.config import load_params
from glm.data.check import summary as summary_of_data
from glm.evaluation.curves import draw_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = {  # of metrics/evaluate.json: name, title, digits
    "loss": ("loss (held out)", 3),
    "bleu-4": ("BLEU-4", 2),
    "rouge-1": ("ROUGE-1", 2),
    "rouge-2": ("ROUGE-2", 2),
    "rouge-l": ("ROUGE-L", 2),
    "reward": ("reward", 2),
    "judge": ("judge's reward", 2),
    "win_rate": ("prompts won against SFT", 2),
    "kl": ("KL to SFT, nats a response", 1),
}
STEP_COLUMNS = ["step", "", "time", "optimizer steps", "seconds per step"]
SAMPLES = 3
LOCAL_PAGES = "http://127.0.0.1:5000"


def collect(root: Path, steps: list[Step], parent_run: str | None, version: str | None) -> dict[str, Any]:
    """Read a finished run's metrics, samples and run records, as plain values.

    A run that ended before `evaluate` has the results of `evaluate_sft`, or none. `version` None: nothing registered.
    """
    params = load_params(root / "params.yaml")
    names = [step.name for step in steps]
    measured = next((name for name in ("evaluate", "evaluate_sft") if name in names), "")
    policy = {params.algorithm: params.algorithm.upper()} if measured == "evaluate" else {}
    samples = root / "reports" / measured / "samples.json"
    return {
        "models": {"base": "base", "sft": "SFT", **policy} if measured else {},
        "steps": [
            {"name": step.name, "state": step.state, "seconds": step.seconds}
            | {key: value for key, value in read_json(root / "runs" / f"{step.name}.json").items() if key != "seconds"}
            for step in steps
        ],
        "metrics": read_json(root / "metrics" / f"{measured}.json") if measured else {},
        "samples": json.loads(samples.read_text(encoding="utf-8"))[:SAMPLES] if samples.exists() else [],
        "parent_run": parent_run,
        "version": version,
        "registered": f"{params.promote.model_name} version {version}, alias challenger" if version else "",
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if the step writes none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def result_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Title and the values of each model of each metric, as text."""
    rows = []
    for name, (title, digits) in ROWS.items():
        values = [summary["metrics"].get(f"{who}.{name}") for who in summary["models"]]
        if any(value is not None for value in values):
            # + 0: no "-0.0"
            cells = ["" if value is None else f"{round(value, digits) + 0:.{digits}f}" for value in values]
            rows.append([title, *cells])
    return rows


def step_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Name, what happened, time, optimizer steps and seconds per step of each stage, as text."""
    return [
        [
            step["name"],
            "executed" if step["state"] == "ran" else "from the cache",
            clock(step["seconds"]),
            str(step.get("steps") or ""),
            f"{step['seconds_per_step']:.3f}" if step.get("seconds_per_step") else "",
        ]
        for step in summary["steps"]
    ]


def sample_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Prompt and the answers of each model."""
    return [[sample["prompt"], *(sample[who] for who in summary["models"])] for sample in summary["samples"]]


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a run's end: results, times, samples, and the lines to type next."""
    if summary["models"]:
        results = Table(title="Before and after, on the test split", title_justify="left")
        results.add_column()
        for title in summary["models"].values():
            results.add_column(title, justify="right")
        for row in result_rows(summary):
            results.add_row(*row)
        console.print(results)
    if "reward.accuracy" in summary["metrics"]:
        accuracy = summary["metrics"]["reward.accuracy"]
        console.print(f"The reward model prefers the better answer in {accuracy:.1%} of the test pairs.\n")

    times = Table(title="Steps", title_justify="left")
    for position, title in enumerate(STEP_COLUMNS):
        times.add_column(title, justify="left" if position < 2 else "right")
    for row in step_rows(summary):
        times.add_row(*row)
    console.print(times)

    if summary["models"]:
        samples = Table(title="The same prompts, answered by", title_justify="left", show_lines=True)
        for title in ["prompt", *summary["models"].values()]:
            samples.add_column(title, ratio=1, overflow="fold")
        for row in sample_rows(summary):
            samples.add_row(*map(Text, row))  # a model may write [bold]
        console.print(samples)

    console.print("\n".join(next_lines(summary)), highlight=False, markup=False)


def next_lines(summary: dict[str, Any]) -> list[str]:
    """What a person can do now."""
    kept = f"dvc exp apply {summary['experiment']}" if "experiment" in summary else ""
    taken = "bring this run's parameters and models into the checkout"
    run = summary["parent_run"] if "experiment" in summary else "models/sft"
    if summary["registered"]:
        talk = {"make chat": "talk to the result"}
    else:  # it ended before, and DVC complains of what its later steps did not make
        talk = {f"glmflow chat {run}": "talk to it", f"glmflow export {run} exports/mine": "for others"} if run else {}
        taken += "; complains of the steps that did not run"
    lines = {
        ". .venv/bin/activate": "once per terminal; then dvc, prefect, glmflow",
        "make ui": "all runs in MLflow: curves, parameters, models",
        **talk,
        kept: taken,
        "dvc repro": "bring everything up to date after an edit",
        "dvc exp show": "compare runs",
        "make deploy": "schedules and runs from a web page",
    }
    registered = [f"Registered as {summary['registered']}."] if summary["registered"] else []
    return [*registered, "", "Next:", *(f"  {line:<28} {purpose}" for line, purpose in lines.items() if line)]


def publish(root: Path, summary: dict[str, Any]) -> None:
    """Prefect artifacts of the flow run: the report, the curves of what it executed, links to the runs in MLflow."""
    create_markdown_artifact(markdown(summary), key="results", description="Before and after, on the test split")
    data = summary_of_data(read_json(root / "reports" / "preprocess" / "report.json"))
    create_markdown_artifact(f"```\n{data}\n```", key="data", description="Rows read, kept, dropped and why")
    for step in summary["steps"]:
        curves = root / "plots" / f"{step['name']}.csv"
        if step["state"] == "ran" and has_curves(curves):  # those of a restored step are with the run that made it
            create_image_artifact(
                curves_url(curves), key=artifact_key("curves", step["name"]), description=f"Curves of {step['name']}"
            )
    runs = {step["name"]: step.get("run_id") for step in summary["steps"]} | {"pipeline": summary["parent_run"]}
    for name, run_id in runs.items():
        if run_id:
            create_link_artifact(
                f"{mlflow_pages()}/#/runs/{run_id}", f"{name} in MLflow", key=artifact_key("mlflow", name)
            )


def artifact_key(what: str, step: str) -> str:
    """Prefect takes small letters, digits and dashes."""
    return f"{what}-{step.replace('_', '-')}"


def markdown(summary: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    accuracy = summary["metrics"].get("reward.accuracy")
    return "\n\n".join(
        [
            "## Before and after",
            table(["", *summary["models"].values()], result_rows(summary)),
            *([f"Reward model: pair accuracy {accuracy:.1%}"] if accuracy is not None else []),
            "## Steps",
            table(STEP_COLUMNS, step_rows(summary)),
            "## Samples",
            table(["prompt", *summary["models"].values()], sample_rows(summary)),
        ]
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. A cell's own bars and line breaks would end it."""
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells])


def has_curves(path: Path) -> bool:
    """Whether a step has left curves: that of a base model that was not trained here has the heading alone."""
    return path.exists() and len(path.read_text(encoding="utf-8").splitlines()) > 1


def curves_url(path: Path) -> str:
    """The curves of a plots/*.csv as a picture that is its own address (the local server keeps no files)."""
    with path.open(encoding="utf-8", newline="") as file:
        points = {
            int(row.pop("step")): {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }
    return picture_url(draw_curves(points, path.stem))


def picture_url(figure: "Figure") -> str:
    """A figure as a picture that is its own address."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


def mlflow_pages() -> str:
    """The address of MLflow's pages: the tracking server if there is one, else where `make ui` serves the store."""
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    return tracking if tracking.startswith("http") else LOCAL_PAGES
