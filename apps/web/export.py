"""Tab Export: what `glmflow export` does, in a process of its own, into a folder below exports/."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from apps.web.fields import Parameter, parameters
from apps.web.form import component
from apps.web.paths import check_path
from apps.web.telling import QUIET, told
from apps.web.texts import Texts
from flows import ROOT
from flows.dvc_stage import stage_environment
from glm.config import Export
from glm.errors import InputError

FOLDER = "exports"
DEFAULTS = Export().model_dump() | {"dtype": "", "push_to_hub": ""}


class Exporting:
    """The process of a visitor's export, while there is one."""

    process: subprocess.Popen[str] | None = None

    def __deepcopy__(self, memo: Any) -> "Exporting":  # gradio copies what a visitor begins with
        return Exporting()


def build(text: Texts) -> None:
    """The tab's components and events."""
    options = [of_export(one, text) for one in parameters() if one.section == "export"]
    state = gr.State(Exporting())
    with gr.Row():
        model = gr.Textbox(
            "models/ppo", label=text("export.model"), info=text("chat.model_info"), elem_id="export-model"
        )
        out = gr.Textbox("", label=text("export.out"), info=text("export.out_info"), elem_id="export-out")
    with gr.Row(elem_classes="fields"):
        fields = [component(one, key_of(one), text, f"x-{key_of(one)}") for one in options]
        for one, field in zip(options, fields, strict=True):
            field.value = DEFAULTS[key_of(one)]
    with gr.Row():
        start = gr.Button(text("export.start"), variant="primary", elem_id="export-start")
        stop = gr.Button(text("chat.stop"), variant="stop")
    said = gr.HTML(elem_id="export-said")

    def begin(exporting: Exporting, model: str, out: str, *values: Any) -> Iterator[str]:
        words = words_of(model, out, dict(zip(options, values, strict=True)))
        if exporting.process:
            raise InputError(text("export.busy"))
        yield from run(exporting, words, text)

    def end(exporting: Exporting) -> None:
        if exporting.process:
            exporting.process.terminate()

    start.click(told(begin), [state, model, out, *fields], said, concurrency_limit=2, **QUIET)
    stop.click(told(end), state, None, **QUIET)


def key_of(one: Parameter) -> str:
    """The parameter's name within its section."""
    return one.name.partition(".")[2]


def of_export(one: Parameter, text: Texts) -> Parameter:
    """A parameter of the section `export` as this tab has it: a dtype may be left out, and what is sent is sent now."""
    if key_of(one) == "dtype":
        return replace(one, choices=("", *one.choices), description=text("export.dtype_info"))
    return replace(one, description=text("export.hub_info")) if key_of(one) == "push_to_hub" else one


def words_of(model: str, out: str, options: dict[Parameter, Any]) -> list[str]:
    """The command line; an option that was left empty is left out.

    Raises:
        InputError: a path leads out of the project, or no folder is named.
    """
    model, out = check_path("model", model), check_path("folder", out)
    if not model or not out:
        raise InputError("model, folder: name both")
    if model.startswith("-"):
        raise InputError(f"model: {model!r} is an option of the command, not a name")
    below = Path(check_path("folder", f"./{out}"))
    if below == Path():
        raise InputError(f"folder: {out!r} is {FOLDER} itself; name one below it")
    words = ["export", model, f"{FOLDER}/{below}"]
    for one, value in options.items():
        option = key_of(one).replace("_", "-")
        if one.is_box:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value:
            words += [f"--{option}", str(value)]
    return words


def run(exporting: Exporting, words: list[str], text: Texts) -> Iterator[str]:
    """Run the command, and show what it says as it says it.

    Raises:
        InputError: with its last line, if it fails.
    """
    command = shlex.join(["glmflow", *words])
    lines: list[str] = []
    exporting.process = subprocess.Popen(
        [sys.executable, "-m", "apps.cli", *words], cwd=ROOT, env=stage_environment() | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        yield shown(command, lines)
        for line in exporting.process.stdout or ():
            lines.append(line.rstrip())
            yield shown(command, lines)
        if exporting.process.wait():
            raise InputError(next((line for line in reversed(lines) if line), text("export.stopped")))
    finally:
        exporting.process.terminate()
        exporting.process = None
    gr.Info(text("export.done"), duration=8)


def shown(command: str, lines: list[str]) -> str:
    """The command and its last lines."""
    return f"<pre class='log'><code>{escape(chr(10).join([f'$ {command}', *lines[-200:]]))}</code></pre>"
