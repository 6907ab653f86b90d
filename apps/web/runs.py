"""Tab Runs: the pipeline's runs in MLflow as a table; chosen ones side by side, with the parameters that differ."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from apps.web.telling import QUIET, SLOW, told
from apps.web.texts import Texts
from flows.report import mlflow_pages, picture_url
from flows.run_table import PipelineRun, difference_table, pipeline_runs, points, result_table, step_runs
from glm.config import load_params
from glm.errors import InputError
from glm.evaluation.curves import draw_together
from glm.html import picture, table

MOST = 8  # runs side by side


def build(tab: gr.Tab, text: Texts) -> None:
    """The tab's components and events."""
    with gr.Row():
        gr.Markdown(text("runs.about", pages=mlflow_pages()))
        refresh = gr.Button(text("refresh"), size="sm", scale=0, min_width=110)
    overview = gr.Dataframe(interactive=False, show_search="filter", max_height=360, elem_id="runs")
    chosen = gr.Dropdown([], multiselect=True, max_choices=MOST, label=text("runs.chosen"), elem_id="runs-chosen")
    differ = gr.HTML(elem_id="runs-differ")
    curve = gr.Dropdown([], label=text("runs.curve"), elem_id="runs-curve")
    drawn = gr.HTML(elem_id="runs-drawn")

    def load() -> tuple[Any, ...]:
        runs = pipeline_runs(load_params())
        head, rows = result_table(runs)
        names = [(f"{run.name} · {run.started}", run.run_id) for run in runs]
        first = [run.run_id for run in runs[:2]]
        return gr.Dataframe(headers=head, value=rows), gr.Dropdown(choices=names, value=first)

    def compare(ids: list[str]) -> tuple[Any, ...]:
        runs = runs_of(ids)
        named = sorted({name for run in runs for name in curve_names(run)})
        best = min(named, key=lambda name: not name.endswith(("/reward", "/loss")), default=None)
        return side_by_side(runs, text), gr.Dropdown(choices=named, value=best)

    def draw(ids: list[str], name: str | None) -> str:
        return overlay(runs_of(ids), name, text) if name else ""

    tab.select(told(load), None, [overview, chosen], **SLOW).then(told(compare), chosen, [differ, curve], **QUIET).then(
        told(draw), [chosen, curve], drawn, **QUIET
    )
    refresh.click(told(load), None, [overview, chosen], **SLOW)
    chosen.input(told(compare), chosen, [differ, curve], **SLOW).then(told(draw), [chosen, curve], drawn, **QUIET)
    curve.input(told(draw), [chosen, curve], drawn, **SLOW)


def runs_of(ids: Sequence[str]) -> list[PipelineRun]:
    """The runs that are chosen, in that order."""
    if len(ids) > MOST:
        raise InputError(f"choose at most {MOST} runs")
    known = {run.run_id: run for run in pipeline_runs(load_params())}
    return [known[run_id] for run_id in ids if run_id in known]


def side_by_side(runs: Sequence[PipelineRun], text: Texts) -> str:
    """The parameters that differ, and the results, a column a run."""
    if not runs:
        return ""
    head = ["", *(run.name for run in runs)]
    names, rows = result_table(runs)
    results = [[name, *(str(row[at]) if row[at] is not None else "" for row in rows)] for at, name in enumerate(names)]
    differ = table(head, difference_table(runs)) if len(runs) > 1 else ""
    title = f"<h3>{text('runs.differ')}</h3>" if differ else ""
    return f"<div class='wide'>{title}{differ}<h3>{text('runs.results')}</h3>{table(head, results[1:])}</div>"


def curve_names(run: PipelineRun) -> set[str]:
    """step/metric of every curve of a run."""
    params = load_params()
    return {
        f"{step}/{name}"
        for step, run_id in step_runs(params, run.run_id).items()
        for values in points(params, run_id).values()
        for name in values
    }


def overlay(runs: Sequence[PipelineRun], name: str, text: Texts) -> str:
    """The same curve of each run that has it."""
    params = load_params()
    step, _, metric = name.partition("/")
    curves = {}
    for number, run in enumerate(runs, start=1):
        if run_id := step_runs(params, run.run_id).get(step):
            found = {at: values[metric] for at, values in points(params, run_id).items() if metric in values}
            if found:
                curves[f"{number}. {run.name}"] = found
    return picture(picture_url(draw_together(curves, name)), name) if curves else f"<p>{text('runs.no_curve')}</p>"
