"""The flow `compare-methods`: variants of the parameters on the same data and budget, in one table.

    glmflow compare --methods lora,p_tuning,freeze,full --seeds 1,2,3      or: python -m flows.compare_methods …
    glmflow compare -S sft.learning_rate=1e-3,2e-3 -S sft.lora_rank=8,16   every combination
    glmflow compare --variant small:sft.lora_rank=4 --variant large:sft.lora_rank=64,sft.learning_rate=1e-3
    glmflow compare recipes/compare_embedded.yaml
    glmflow compare --experiments all                                      what `dvc exp run` has made; runs nothing
    prefect deployment run compare-methods/default -p 'variants={"r4": {"sft.lora_rank": 4}, …}' -p 'seeds=[1, 2]'

Each variant runs once a seed, a cell of the table, in a workspace of its own and through the pipeline's own stages: DVC
shares whatever cells have in common, restores what is there already, and keeps each cell as an experiment of the same
name as its MLflow run. A cell that fails is told in the table and does not stop the others. The last row's neighbour is
the untuned base, measured on the same held-out rows.
"""

import argparse
import hashlib
import json
import sys
import time
from contextlib import chdir
from pathlib import Path
from statistics import fmean
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from rich.console import Console

from flows import ROOT, comparison_report
from flows.arguments import comparison_parser
from flows.cells import Cell, Comparison, parse_settings, parse_variant, plan, product, read_recipe, validated
from flows.comparison_report import Outcome, Report
from flows.dvc_stage import DVC_SAYS, run_cache_keys
from flows.experiments import read_experiments
from flows.interrupt import stop_if_asked
from flows.notify import notify
from flows.progress import clock
from flows.report import read_json
from flows.rlhf_pipeline import make_board, mlflow_parent, run_steps
from flows.terminal import exit_status, in_terminal
from flows.workspace import uncommitted, workspace
from glm.config import Params, load_params
from glm.errors import InputError
from tasks.lineage import git_tags


@flow(
    name="compare-methods",
    on_completion=[notify],
    on_failure=[notify],
    on_crashed=[notify],
    on_cancellation=[notify],
)
def compare_methods(
    variants: dict[str, dict[str, Any]],
    seeds: list[int] | None = None,
    overrides: dict[str, Any] | None = None,
    name: str = "compare",
    until: str | None = None,
) -> State[Any]:
    """Run each variant once a seed, and write the table.

    Args:
        variants: by name, the dotted names of params.yaml in which each differs, with their values.
        seeds: of training and sampling; the one of params.yaml if empty. Data and base model are the same for all.
        overrides: what all variants have in common beside params.yaml.
        name: of the comparison: its folder is reports/compare/<name>, and its cells are <name>-<variant>-seed<seed>.
        until: the last step, evaluate_sft or evaluate; empty: as far as the variants differ.

    Returns:
        A state that is Failed if some cell failed.
    """
    fields = {"name": name, "variants": variants, "seeds": seeds or [], "overrides": overrides or {}, "until": until}
    comparison = validated(fields, "compare-methods")
    cells, steps = plan(comparison)
    if files := uncommitted():
        get_run_logger().warning("The cells use the last commit, without the changes in %s", ", ".join(files))
    varied = list(dict.fromkeys(key for settings in variants.values() for key in settings))
    return report_cells(name, cells[0].params, steps[-1], varied, cells, steps)


def report_cells(
    name: str, params: Params, end: str, varied: list[str], cells: list[Cell], steps: list[str]
) -> State[Any]:
    """Run the cells below one MLflow run, and write and publish what they came to."""
    from tasks.tracking import finish_parent_run

    run_id, experiment_id = start_comparison(name, params, [cell.name for cell in cells], comparison_key(cells))
    status = "KILLED"
    artifacts: list[Path] = []
    try:
        outcomes = run_cells(cells, steps, run_id)
        report = Report(name, end, outcomes, varied, run_id, experiment_id)
        artifacts.append(comparison_report.write(report, ROOT))
        comparison_report.publish(report)
        write_to_mlflow(report, params)
        comparison_report.show(report, artifacts[0].relative_to(ROOT), Console())
        status = "FAILED" if report.failed else "FINISHED"
    finally:
        with chdir(ROOT):
            finish_parent_run(run_id, status, [], artifacts)
    if report.failed:
        return Failed(message=f"{len(report.failed)} of {len(cells)} cells failed: {report.failed[0].error}")
    return Completed(message=f"{len(cells)} cells, in {artifacts[0].relative_to(ROOT)}")


def run_cells(cells: list[Cell], steps: list[str], parent: str | None) -> list[Outcome]:
    """Run every cell, and tell how far the comparison is. A cell's failure is part of its outcome."""
    outcomes: list[Outcome] = []
    seconds: list[float] = []  # of each cell; the first one also makes what all have in common
    for number, one in enumerate(cells, start=1):
        stop_if_asked()
        rest = (len(cells) - number + 1) * fmean(seconds[1:]) if seconds[1:] else 0.0
        left = f", about {clock(rest)} to go" if rest else ""
        print(f"{one.variant}, seed {one.seed} ({number} of {len(cells)}{left})", flush=True)
        started = time.monotonic()
        run = cell.with_options(flow_run_name=one.name)
        like = next((outcome.name for outcome in reversed(outcomes) if not outcome.error), None)
        state = run(one.name, one.variant, one.seed, one.overrides, steps, parent, like, return_state=True)
        seconds.append(time.monotonic() - started)
        found = state.result(raise_on_failure=False)
        if isinstance(found, Outcome):
            outcomes.append(found)
        else:
            outcomes.append(Outcome(one.name, one.variant, one.seed, None, error=reason(found)))
            print(f"{one.name} failed: {outcomes[-1].error}", flush=True)
    return outcomes


@flow(name="compare-cell")
def cell(
    name: str,
    variant: str,
    seed: int,
    overrides: dict[str, Any],
    steps: list[str],
    parent_run: str | None,
    like: str | None,
) -> Outcome:
    """One variant with one seed: the pipeline's stages in a workspace, kept as the DVC experiment `name`.

    `like` is the cell before, which has most of the stages in common with this one.
    """
    tags = {"glmflow.variant": variant, "mlflow.note.content": note(overrides)}
    tags |= {"mlflow.parentRunId": parent_run} if parent_run else {}
    with workspace(name, overrides, steps, like) as root:
        keys = run_cache_keys(steps, root)
        board = make_board(steps, root, keys)
        with board.shown(), mlflow_parent(root, name, tags, key=f"{parent_run}:{name}") as (run_id, done):
            run_steps(steps, root, board, keys, run_id, done)
            algorithm = load_params(root / "params.yaml").algorithm
            values, before = comparison_report.measure(lambda path: read_json(root / path), steps[-1], algorithm)
    return Outcome(name, variant, seed, run_id, values, before)


def note(overrides: dict[str, Any]) -> str:
    """What MLflow's page says of a cell."""
    return "\n".join(
        ["A cell of the comparison above it:", *(f"- `{key}: {value}`" for key, value in overrides.items())]
    )


def reason(error: object) -> str:
    """Why a cell failed, in one line: the last thing that its stage said."""
    lines = [line for line in str(error).splitlines() if line.strip() and not DVC_SAYS.match(line)]
    return lines[-1].strip() if lines else type(error).__name__


def comparison_key(cells: list[Cell]) -> str:
    """The same for the same cells on the same commit: an interrupted comparison goes on in its MLflow run."""
    content = [git_tags().get("mlflow.source.git.commit"), [[cell.name, cell.params.model_dump()] for cell in cells]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def start_comparison(name: str, params: Params, cells: list[str], key: str) -> tuple[str | None, str | None]:
    """Open the comparison's run in MLflow; return its id and its experiment's, None if MLflow is out of order."""
    from tasks.tracking import open_store, start_parent_run

    described = f"A comparison of {len(cells)} cells, which are the runs below this one: {', '.join(cells)}."
    tags = {"glmflow.step": "compare", "glmflow.compare": name, "mlflow.note.content": described}
    with chdir(ROOT):
        run_id = start_parent_run(params, f"compare {name}", tags, key)
    return run_id, open_store(params.tracking.experiment)[1] if run_id else None


def write_to_mlflow(report: Report, params: Params) -> None:
    """The cells' metrics by their plain names on the cells' runs; means and the table on the comparison's run."""
    from tasks.comparison_run import write_results

    for one in report.outcomes:
        if one.run_id:
            tags = {"glmflow.variant": one.variant, "glmflow.compare": report.name}
            write_results(params, one.run_id, one.values, tags, parent_id=report.run_id)
    if report.run_id:
        means = {f"{row.variant}.{name}": value for row in report.rows for name, value in row.mean.items()}
        write_results(params, report.run_id, means, {"mlflow.note.content": comparison_report.markdown(report)})


def main(words: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 1 a cell failed, 2 wrong input, 130 stopped."""
    arguments = comparison_parser().parse_args(words)
    return exit_status(lambda: run_command(arguments), "Stopped. The same command goes on with what is missing.")


def run_command(arguments: argparse.Namespace) -> int:
    """Compare what the command line asks for."""
    if arguments.experiments:
        return compare_experiments(arguments)
    comparison = read_arguments(arguments)
    cells, steps = plan(comparison)
    if files := [file for file in uncommitted() if file != arguments.recipe]:
        raise InputError(f"a comparison uses the last commit, without your changes in {', '.join(files)}: commit first")
    print(f"{len(cells)} cells, each up to {steps[-1]}", flush=True)
    with in_terminal():
        state = compare_methods(**comparison.model_dump(), return_state=True)
    if state.is_failed():
        print(state.message, file=sys.stderr)
        return 1
    return 0


def read_arguments(arguments: argparse.Namespace) -> Comparison:
    """The comparison that a command line asks for.

    Raises:
        InputError: an option is not right, or a recipe and options name variants both.
    """
    asked = [f"sft.method={arguments.methods}"] if arguments.methods else []
    asked += [f"algorithm={arguments.algorithms}"] if arguments.algorithms else []
    settings = parse_settings(asked) | parse_settings(arguments.settings)
    varied = {name: values for name, values in settings.items() if len(values) > 1 or f"{name}={values[0]}" in asked}
    common = {name: values[0] for name, values in settings.items() if name not in varied}
    own = dict(parse_variant(text) for text in arguments.variants)
    if len(own) < len(arguments.variants):
        raise InputError("--variant: a name is given twice")
    given = {"name": arguments.name, "until": arguments.until, "seeds": read_seeds(arguments.seeds)}
    given = {name: value for name, value in given.items() if value}
    if arguments.recipe:
        if varied or own:
            raise InputError(f"{arguments.recipe} names the variants: leave --methods, --algorithms and --variant out")
        recipe = read_recipe(arguments.recipe).model_dump()
        return validated(recipe | given | {"overrides": recipe["overrides"] | common}, arguments.recipe)
    kind = {"sft.method": "methods", "algorithm": "algorithms"}.get(",".join(varied), "compare")
    variants = (product(varied) if varied or not own else {}) | own
    return validated({"name": kind, "variants": variants, "overrides": common} | given, "compare")


def read_seeds(text: str | None) -> list[int]:
    """`1,2,3` as numbers."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"--seeds {text!r}: expected whole numbers, such as 1,2,3") from None


def compare_experiments(arguments: argparse.Namespace) -> int:
    """The table of DVC experiments that are there; runs nothing. Returns the exit status."""
    from tasks.tracking import finish_parent_run

    outcomes, params, end, varied = read_experiments(arguments.experiments, arguments.until)
    name = arguments.name or "experiments"
    names = [one.name for one in outcomes]
    key = hashlib.sha256(json.dumps([name, names]).encode()).hexdigest()[:16]
    run_id, experiment_id = start_comparison(name, params, names, key)
    report = Report(name, end, outcomes, varied, run_id, experiment_id)
    folder = comparison_report.write(report, ROOT)
    write_to_mlflow(report, params)
    with chdir(ROOT):
        finish_parent_run(run_id, "FAILED" if report.failed else "FINISHED", [], [folder])
    comparison_report.show(report, folder.relative_to(ROOT), Console())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
