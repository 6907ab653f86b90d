"""What a comparison comes to: its tables as text, in reports/compare/<name>, and as Prefect artifacts."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from flows.report import mlflow_pages, table
from glm.evaluation import comparison
from glm.evaluation.comparison import Column, Result, Row
from glm.files import replace_folder, write_text

Read = Callable[[str], dict[str, Any]]  # a JSON file of a cell by its path; empty if there is none

TEXT = (
    Column("bleu-4", "BLEU-4", 2),
    Column("rouge-1", "ROUGE-1", 2),
    Column("rouge-2", "ROUGE-2", 2),
    Column("rouge-l", "ROUGE-l", 2),
    Column("loss", "loss", 3),
)
POLICY = (
    Column("gain", "judge: gain over SFT", 2),
    Column("win_rate", "win rate against SFT", 2),
    Column("reward", "reward", 2),
    Column("kl", "KL to SFT", 1),
)
COST = (
    Column("trainable_parameters", "trainable", 0),
    Column("trainable_percent", "trainable, %", 2),
    Column("peak_memory_gb", "peak memory, GB", 2),
    Column("examples_per_second", "examples/s", 1),
    Column("tokens_per_second", "tokens/s", 0),
    Column("seconds", "time, s", 0),
    Column("cpu_seconds", "CPU time, s", 0),
)
COLUMNS = {"evaluate_sft": (*TEXT, *COST), "evaluate": (*POLICY, *TEXT, *COST)}
BEFORE = {"evaluate_sft": ["base"], "evaluate": ["base", "sft"]}  # rows to compare with, untuned first


@dataclass(frozen=True)
class Outcome:
    """What became of a cell. `name` is its DVC experiment's and its MLflow run's."""

    name: str
    variant: str
    seed: int
    run_id: str | None
    values: dict[str, float] = field(default_factory=dict)
    before: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # of the base, and of SFT where a policy is judged
    error: str = ""


@dataclass(frozen=True)
class Report:
    """A comparison with all that is told of it."""

    name: str
    end: str
    outcomes: list[Outcome]
    varied: list[str]  # dotted names that differ between variants
    run_id: str | None  # in MLflow
    experiment_id: str | None

    @property
    def rows(self) -> list[Row]:
        """Base and SFT, then the variants."""
        results = [result for who in BEFORE[self.end] for result in before(who, self.outcomes, self.varied)]
        results += [Result(cell.variant, cell.seed, cell.values, cell.error) for cell in self.outcomes]
        return comparison.rows(results)

    @property
    def columns(self) -> list[Column]:
        """Those that hold something."""
        return comparison.shown(COLUMNS[self.end], self.rows)

    @property
    def failed(self) -> list[Outcome]:
        """The cells that came to nothing."""
        return [cell for cell in self.outcomes if cell.error]

    @property
    def link(self) -> str | None:
        """MLflow's page that lays the cells' runs side by side."""
        runs = [cell.run_id for cell in self.outcomes if cell.run_id]
        if not runs or self.experiment_id is None:
            return None
        chosen = f"runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([self.experiment_id]))}"
        return f"{mlflow_pages()}/#/compare-runs?{chosen}"


def measure(read: Read, end: str, algorithm: str) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics of what a cell trained, metrics of what it is compared with), from the files of its stages."""
    who = "sft" if end == "evaluate_sft" else algorithm
    metrics, record = read(f"metrics/{end}.json"), read(f"runs/{who}.json")
    names = [f"{column.name}{part}" for column in COLUMNS[end] for part in ("", "_low", "_high")]
    found = read(f"metrics/{who}.json") | record.get("speed", {}) | record | of(who, metrics)
    return pick(found, names), {other: pick(of(other, metrics), names) for other in BEFORE[end]}


def of(who: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics `<who>.<name>` by their name."""
    return {name.removeprefix(f"{who}."): value for name, value in metrics.items() if name.startswith(f"{who}.")}


def pick(values: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The named ones of `values` that are there."""
    return {name: values[name] for name in names if values.get(name) is not None}


def before(who: str, outcomes: Sequence[Outcome], varied: Sequence[str]) -> list[Result]:
    """The results of base or SFT: one a seed where all variants share it, else one a cell."""
    own = ("model.", "data.", "evaluate.", *(["sft."] if who == "sft" else []))
    good = [cell for cell in outcomes if not cell.error]
    if any(name.startswith(own) for name in varied):
        return [Result(f"{who} of {cell.variant}", cell.seed, cell.before[who]) for cell in good]
    return [Result(who, seed, values) for seed, values in {cell.seed: cell.before[who] for cell in good}.items()]


def table_rows(report: Report, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of means, as text."""
    header = ["", *(column.title for column in columns), "seeds"]
    return header, [
        [row.variant, *(comparison.text(row, column) for column in columns), seeds(row)] for row in report.rows
    ]


def seeds(row: Row) -> str:
    """How many seeds there are, and how many failed."""
    return f"{row.seeds}, {row.failed} failed" if row.failed else str(row.seeds)


def cell_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of cells: what they are called everywhere, and their metrics or their fault."""
    header = ["cell", "variant", "seed", "MLflow run", *(column.title for column in report.columns), "failed"]
    return header, [
        [cell.name, cell.variant, str(cell.seed), cell.run_id or ""]
        + [comparison.text(Row("", 1, 0, cell.values, {}), column) for column in report.columns]
        + [cell.error]
        for cell in report.outcomes
    ]


def markdown(report: Report) -> str:
    """Both tables, and where to read on."""
    parts = [
        f"# {report.name}",
        table(*table_rows(report, report.columns)),
        "Mean ± standard deviation over the seeds, on the same held-out rows; greedy answers. Speed and time are those "
        "of the step that trained; peak memory is what the GPU had allocated, or on a CPU the process's resident set.",
        "A cell's name is that of its DVC experiment (`dvc exp show`, `dvc exp apply NAME`) and of its MLflow run.",
        table(*cell_rows(report)),
    ]
    if report.link:
        parts.append(f"[The runs side by side in MLflow]({report.link})")
    return "\n\n".join(parts) + "\n"


def cells_csv(report: Report) -> str:
    """One line a cell with every digit: experiment, variant, seed, MLflow run, metrics, fault."""
    out = io.StringIO()
    names = [column.name for column in report.columns]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["experiment", "variant", "seed", "mlflow_run_id", *names, "error"])
    for cell in report.outcomes:
        values = [cell.values.get(name, "") for name in names]
        writer.writerow([cell.name, cell.variant, cell.seed, cell.run_id or "", *values, cell.error])
    return out.getvalue()


def write(report: Report, root: Path) -> Path:
    """Write table.md, table.csv, cells.csv and plot.png into reports/compare/<name>, all at once; return the folder."""
    path = root / "reports" / "compare" / report.name
    with replace_folder(path) as folder:
        write_text(folder / "table.md", markdown(report))
        write_text(folder / "table.csv", comparison.table_csv(report.rows, report.columns))
        write_text(folder / "cells.csv", cells_csv(report))
        if report.columns:
            comparison.draw(report.rows, report.columns, report.name).savefig(folder / "plot.png")
    return path


def publish(report: Report) -> None:
    """Prefect artifacts of the flow run: the table, the cells, the link to MLflow."""
    header, cells = table_rows(report, report.columns)
    header[0] = "variant"
    create_table_artifact(
        [dict(zip(header, row, strict=True)) for row in cells], key="comparison", description=report.name
    )
    create_markdown_artifact(markdown(report), key="comparison-cells", description="Every cell, by the same names")
    if report.link:
        create_link_artifact(report.link, "The cells side by side in MLflow", key="mlflow-comparison")


def show(report: Report, folder: Path, console: Console) -> None:
    """Print the table in parts that fit a terminal, what failed, and where to look further."""
    console.print(f"{report.name}: mean ± standard deviation over the seeds", markup=False, highlight=False)
    for group in (POLICY, TEXT, COST):
        columns = [column for column in report.columns if column in group]
        header, cells = table_rows(report, columns)
        part = Table()
        for position, title in enumerate(header):
            part.add_column(title, justify="right" if position else "left", no_wrap=True)
        for row in cells:
            part.add_row(*row)
        if columns:  # every digit, also where the terminal is narrower, or where there is none
            wanted = Measurement.get(console, console.options.update(width=1000), part).maximum
            console.width = max(console.width, wanted)
            console.print(part)
    for cell in report.failed:
        console.print(f"{cell.name} failed: {cell.error}", style="red", markup=False, highlight=False, soft_wrap=True)
    lines = [
        f"Written to {folder}: table.md, table.csv, cells.csv, plot.png",
        f"Side by side in MLflow (make ui): {report.link}" if report.link else "",
        "dvc exp show shows the same cells by the same names; dvc exp apply NAME brings one into the checkout",
    ]
    for line in filter(None, lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
