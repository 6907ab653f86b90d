"""Tab Train: fill in parameters, see what they come to, start a run that outlives the page, watch it, stop it."""

from html import escape
from typing import Any

import gradio as gr

from apps.web.fields import Filled, Form, command, read_form
from apps.web.form import ParameterForm, changes_html
from apps.web.telling import QUIET, SLOW, told
from apps.web.texts import Texts
from apps.web.watch import curves_html, log_html, status_html
from flows import ROOT, background
from flows.rlhf_pipeline import STAGES, check
from flows.workspace import uncommitted
from glm.errors import InputError

LOOK_SECONDS = 1.5
DRAW_SECONDS = 5.0


def build(page: gr.Blocks, text: Texts) -> None:
    """The tab's components and events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=480):
            until = gr.Dropdown(
                [(text("train.everything"), ""), *((step, step) for step in list(STAGES)[:-1])],
                value="", label=text("train.until"), info=text("train.until_info"), elem_id="until",
            )  # fmt: skip
            form = ParameterForm(text)
        with gr.Column(scale=2, min_width=380):
            preview = gr.HTML(elem_id="preview")
            with gr.Row():
                start = gr.Button(text("train.start"), variant="primary", elem_id="start", min_width=90)
                stop = gr.Button(text("train.stop"), variant="stop", elem_id="stop", min_width=90)
                resume = gr.Button(text("train.resume"), elem_id="resume", min_width=90)
            chosen = gr.Dropdown([], label=text("train.run"), elem_id="run", interactive=True)
            status = gr.HTML(elem_id="status")
    with gr.Row(equal_height=False):
        curves = gr.HTML(elem_id="curves")
    with gr.Accordion(text("train.log"), open=True):
        log = gr.HTML(elem_id="log")
    drawn, known = gr.State(None), gr.State([])  # what is drawn, and the runs that may be chosen
    fields = list(form.components.values())

    def show(until: str, *values: Filled) -> str:
        return preview_html(read_form(form.filled(values)), until, text)

    def verdicts(until: str, *values: Filled) -> list[dict[str, object]]:
        return [gr.validate(True, ""), *form.faults(read_form(form.filled(values)).faults)]

    def begin(until: str, *values: Filled) -> Any:
        filled = read_form(form.filled(values))
        refuse(filled)
        return told_of(background.start(filled.words(until)), text)

    def again(name: str) -> Any:
        return told_of(background.start(find(name, text).words), text)

    def end(name: str) -> str:
        run = find(name, text)
        run.stop()
        return status_html(run, text)

    def look(name: str | None, known: list[str]) -> tuple[Any, ...]:
        names = background.names()
        name = follow(name, known, names)
        box = gr.skip() if names == known else gr.Dropdown(choices=names, value=name)
        if not name:
            return f"<p class='note'>{escape(text('train.no_run'))}</p>", "", *buttons("none"), box, names
        run = find(name, text)
        return status_html(run, text), log_html(run), *buttons(run.state()), box, names

    def draw(name: str, drawn: Any) -> tuple[Any, Any]:
        picture, shown = curves_html(find(name, text), drawn) if name else ("", None)
        return (gr.skip() if picture is None else picture), shown

    def load() -> tuple[Any, ...]:
        return "", *form.values(), choices()

    def columns(algorithm: str) -> list[Any]:
        return [gr.Column(visible=name == algorithm) for name in form.columns]

    form_inputs = [until, *fields]
    shown = [status, log, start, stop, resume, chosen, known]
    looking: dict[str, Any] = {"fn": told(look), "inputs": [chosen, known], "outputs": shown, **QUIET}
    drawing: dict[str, Any] = {"fn": told(draw), "inputs": [chosen, drawn], "outputs": [curves, drawn], **QUIET}
    loaded = page.load(told(load), None, [until, *fields, chosen], **QUIET)
    loaded.then(told(show), form_inputs, preview, **QUIET).then(**looking).then(**drawing)
    edited = [field.blur if isinstance(field, gr.Textbox) else field.input for field in fields]
    gr.on([until.input, *edited], told(show), form_inputs, preview, trigger_mode="always_last", **QUIET)
    gr.on(edited, nothing, form_inputs, None, validator=verdicts, trigger_mode="always_last", **QUIET)
    algorithm = form.components["algorithm"]
    algorithm.change(columns, algorithm, list(form.columns.values()), **QUIET)
    start.click(told(begin), form_inputs, chosen, validator=verdicts, **SLOW).success(**looking)
    resume.click(told(again), chosen, chosen, **SLOW).success(**looking)
    stop.click(told(end), chosen, status, **QUIET)
    chosen.input(**looking).then(**drawing)
    gr.Timer(LOOK_SECONDS).tick(**looking)
    gr.Timer(DRAW_SECONDS).tick(**drawing)


def nothing(*values: Any) -> None:
    """What an event does whose validator is all that is wanted."""


def follow(name: str | None, known: list[str], names: list[str]) -> str | None:
    """The run to show: who looks at the newest of those `known` goes on to one that was started elsewhere meanwhile."""
    stays = name in names and name != (known or names)[0]
    return name if stays else next(iter(names), None)


def find(name: str, text: Texts) -> background.BackgroundRun:
    """The run that is chosen on the page."""
    if not name:
        raise InputError(text("train.no_run"))
    return background.find(name)


def refuse(form: Form) -> None:
    """Raise an InputError for what the command itself would refuse."""
    if form.faults:
        name, message = next(iter(form.faults.items()))
        raise InputError(f"{name}: {message}")
    check(ROOT, form.overrides)
    if form.overrides and (files := uncommitted()):
        raise InputError(f"a run with other parameters uses the last commit: commit first: {', '.join(files)}")


def choices() -> Any:
    """The runs to choose from, the newest chosen."""
    names = background.names()
    return gr.Dropdown(choices=names, value=names[0] if names else None)


def told_of(run: background.BackgroundRun, text: Texts) -> Any:
    """The runs to choose from, after one has been started."""
    gr.Info(text("train.started", name=run.name), duration=5)
    return choices()


def buttons(state: str) -> tuple[Any, Any, Any]:
    """Start, stop and resume: which of them can be pressed."""
    busy = state in ("running", "stopping")
    ended_early = state in ("failed", "stopped", "killed", "refused")
    return gr.Button(interactive=not busy), gr.Button(interactive=busy), gr.Button(interactive=ended_early)


def preview_html(form: Form, until: str, text: Texts) -> str:
    """What the form comes to: faults, differences, where it will run, and the command that does the same."""
    faults = "".join(f"<li><b>{escape(name)}</b>: {escape(message)}</li>" for name, message in form.faults.items())
    parts = [f"<h3>{escape(text('train.changes'))}</h3>", changes_html(form.before, form.overrides, text)]
    if faults:
        return "".join([*parts, f"<ul class='faults'>{faults}</ul>"])
    where = text("train.in_workspace") if form.overrides else text("train.in_checkout")
    return "".join(
        [
            *parts,
            f"<p class='note'>{escape(where)}</p>",
            f"<h3>{escape(text('train.command'))}</h3><pre class='command'>{escape(command(form.words(until)))}</pre>",
        ]
    )
