"""Tab Models: registered versions and their aliases, promoting and going back, where a model comes from."""

import base64
import io
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from rich.console import Console

from apps.web.paths import check_path
from apps.web.telling import QUIET, SLOW, told
from apps.web.texts import Texts
from flows import champion
from flows.lineage import trace
from flows.lineage_view import draw, tree
from glm.config import load_params
from glm.errors import InputError
from glm.html import picture, table


def build(tab: gr.Tab, text: Texts) -> None:
    """The tab's components and events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=480):
            overview = gr.HTML(elem_id="versions")
            history = gr.HTML(elem_id="moves")
        with gr.Column(scale=2, min_width=340):
            version = gr.Dropdown([], label=text("models.version"), elem_id="version")
            reason = gr.Textbox(
                "", label=text("models.reason"), info=text("models.reason_info"), lines=2, elem_id="reason"
            )
            with gr.Row():
                promote = gr.Button(text("models.promote"), variant="primary", elem_id="promote", min_width=120)
                rollback = gr.Button(text("models.rollback"), variant="stop", elem_id="rollback", min_width=120)
            said = gr.HTML(elem_id="models-said")
    with gr.Row():
        target = gr.Textbox(
            "",
            label=text("models.lineage_of"),
            info=text("models.lineage_info"),
            max_lines=1,
            scale=4,
            elem_id="lineage-of",
        )
        show = gr.Button(text("models.lineage"), elem_id="lineage", scale=1, min_width=120)
    drawn = gr.HTML(elem_id="lineage-drawn")

    def load() -> tuple[Any, ...]:
        params = load_params()
        name, known = params.promote.model_name, champion.versions(params)
        numbers = [one.number for one in known]
        of = (
            f"models:/{name}@champion"
            if any("champion" in one.aliases for one in known)
            else f"models:/{name}@challenger"
        )
        return (
            versions_html(name, known, text),
            moves_html(champion.moves(params) if known else [], text),
            gr.Dropdown(choices=numbers, value=numbers[0] if numbers else None),
            of,
        )

    def promoted(number: str | None, why: str) -> str:
        if not number:
            raise InputError(text("models.none"))
        params = load_params()
        now, before = champion.promote(number, why, params)
        key = "models.is_already" if now == before else "models.promoted"
        return note(text(key, name=params.promote.model_name, version=now, before=before or "–"))

    def rolled_back(why: str) -> str:
        params = load_params()
        now, before = champion.rollback(why, params)
        return note(text("models.rolled_back", name=params.promote.model_name, version=now, before=before or "–"))

    outputs = [overview, history, version]
    tab.select(told(load), None, [*outputs, target], **QUIET)

    def refresh() -> tuple[Any, ...]:
        return load()[:-1]  # not what somebody may be typing by now

    promote.click(told(promoted), [version, reason], said, **SLOW).success(told(refresh), None, outputs, **QUIET)
    rollback.click(told(rolled_back), reason, said, **SLOW).success(told(refresh), None, outputs, **QUIET)
    show.click(told(lineage_html), target, drawn, **SLOW)


def note(text: str) -> str:
    """What has been done."""
    return f"<p class='done'>{escape(text)}</p>"


def versions_html(name: str, known: list[champion.Version], text: Texts) -> str:
    """The registered versions, the newest first."""
    if not known:
        return f"<p class='note'>{escape(text('models.none'))}</p>"
    head = [text(f"models.{key}") for key in ("version", "aliases", "registered", "gate", "why")]
    rows = [[one.number, ", ".join(one.aliases), one.registered, one.gate, one.why] for one in known]
    return f"<h3>{escape(name)}</h3><div class='wide'>{table(head, rows)}</div>"


def moves_html(moves: list[champion.Move], text: Texts) -> str:
    """Who made which version the champion, the last move first."""
    if not moves:
        return ""
    head = [text(f"models.{key}") for key in ("at", "action", "version", "before", "by", "why")]
    rows = [
        [one.at[:16].replace("T", " "), one.action, one.version, one.before or "", one.by, one.reason]
        for one in reversed(moves)
    ]
    return f"<h3>{escape(text('models.moves'))}</h3><div class='wide'>{table(head, rows)}</div>"


def lineage_html(target: str) -> str:
    """Where a model comes from: the drawing, and all of it as text."""
    found = trace(check_path("lineage", target))
    with tempfile.TemporaryDirectory() as folder:
        drawing = Path(folder, "lineage.svg")
        draw(found, drawing)
        address = f"data:image/svg+xml;base64,{base64.b64encode(drawing.read_bytes()).decode()}"
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(tree(found))
    said = escape(console.export_text())
    return f"{picture(address, target)}<pre class='log'><code>{said}</code></pre>"
