"""Tab Data: the registered datasets, rows as the pipeline reads them, what preprocessing made of them."""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr

from apps.web.telling import QUIET, SLOW, told
from apps.web.texts import Texts
from flows import ROOT
from flows.report import read_json
from glm.config import Data, load_params
from glm.data.check import check
from glm.data.raw_rows import read_rows
from glm.data.registry import Entry, read_registry
from glm.data.report_page import sections
from glm.data.rows import USES, Use
from glm.data.sources import local_files
from glm.errors import InputError
from glm.html import table

PAGE = 5  # rows
LONGEST = 2000  # characters of a row that are shown


def build(tab: gr.Tab, text: Texts) -> None:
    """The tab's components and events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=360):
            overview = gr.HTML(elem_id="datasets")
        with gr.Column(scale=3, min_width=480):
            with gr.Row():
                name = gr.Dropdown([], label=text("data.dataset"), elem_id="dataset", min_width=160)
                use = gr.Dropdown(
                    list(USES), value="sft", label=text("data.use"), info=text("data.use_info"), min_width=160
                )
                at = gr.Number(
                    1, precision=0, minimum=1, label=text("data.first_row"), elem_id="first-row", min_width=100
                )
            with gr.Row():
                back = gr.Button("◀", min_width=60, elem_id="rows-back")
                forth = gr.Button("▶", min_width=60, elem_id="rows-forth")
                examine = gr.Button(text("data.check"), min_width=120, elem_id="check")
            rows = gr.HTML(elem_id="rows")
            checked = gr.HTML(elem_id="checked")
    with gr.Accordion(text("data.report"), open=False):
        report = gr.HTML(elem_id="report", elem_classes="report")

    def load() -> tuple[Any, ...]:
        data = load_params().data
        entries = read_registry(ROOT / data.dataset_dir)
        first = next(iter(data.sft))
        return datasets_html(entries, data, text), gr.Dropdown(choices=list(entries), value=first), report_html(text)

    def show(name: str, use: Use, first: float) -> str:
        return rows_html(name, use, max(1, int(first)), text)

    def turn(step: int, name: str, use: Use, first: float) -> tuple[int, str]:
        start = max(1, int(first) + step * PAGE)
        return start, rows_html(name, use, start, text)

    inputs = [name, use, at]
    tab.select(told(load), None, [overview, name, report], **QUIET).then(told(show), inputs, rows, **QUIET)
    name.input(lambda: (1, "", ""), None, [at, rows, checked], **QUIET).then(told(show), inputs, rows, **QUIET)
    gr.on([use.input, at.submit, at.blur], told(show), inputs, rows, **QUIET)
    back.click(told(lambda *values: turn(-1, *values)), inputs, [at, rows], **QUIET)
    forth.click(told(lambda *values: turn(1, *values)), inputs, [at, rows], **QUIET)
    examine.click(told(examined), [name, use], checked, **SLOW)


def datasets_html(entries: dict[str, Entry], data: Data, text: Texts) -> str:
    """Name, source, whether it is here, and what params.yaml uses it for."""
    rows = []
    for name, entry in entries.items():
        uses = ", ".join(use for use in USES if name in getattr(data, use))
        source = entry.file_name or entry.hf_hub_url or entry.script_url or entry.package or "url"
        rows.append([name, str(source), text(f"data.{where(name, entry, data)}"), uses])
    return f"<div class='wide'>{table([text('data.dataset'), text('data.source'), '', text('data.use')], rows)}</div>"


def where(name: str, entry: Entry, data: Data) -> str:
    """`here`, `elsewhere` (it would be downloaded), or `missing`."""
    try:
        return "elsewhere" if local_files(name, entry, ROOT / data.dataset_dir) is None else "here"
    except InputError:
        return "missing"


def rows_html(name: str, use: Use, first: int, text: Texts) -> str:
    """A page of a dataset's rows, each in the shape of the use, or as it is with the reason why it cannot serve."""
    data = load_params().data
    entry = read_registry(ROOT / data.dataset_dir, [name])[name]
    files = local_files(name, entry, ROOT / data.dataset_dir)
    if files is None:
        raise InputError(text("data.not_here", name=name))
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            Path(folder, file.name).symlink_to(file.resolve())
        shown = list(islice(read_rows(name, entry, Path(folder), use), first - 1, first - 1 + PAGE))
    body = []
    for number, read in enumerate(shown, start=first):
        row = {key: value for key, value in (read.row or {}).items() if key not in ("id", "group")}
        value = json.dumps(row, ensure_ascii=False, indent=1) if row else f"✗ {read.reason}"
        body.append([str(number), read.id, value[:LONGEST] + ("…" if len(value) > LONGEST else "")])
    if not body:
        return f"<p class='note'>{text('data.no_rows')}</p>"
    return f"<div class='rows'>{table(['', text('data.row'), use], body)}</div>"


def examined(name: str, use: str) -> str:
    """What `glmflow data check NAME --use USE` says, as the report shows it."""
    data = load_params().data.model_copy(update={one: [] for one in USES} | {use: [name]})
    return f"<div class='report'>{''.join(sections(check(data)))}</div>"


def report_html(text: Texts) -> str:
    """What the last preprocessing in the checkout made of its datasets."""
    report = read_json(ROOT / "reports" / "preprocess" / "report.json")
    return "".join(sections(report)) if report else f"<p class='note'>{text('data.no_report')}</p>"
