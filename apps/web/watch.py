"""How a background run is doing, as HTML: its steps with bars, what it said, its curves."""

import time
from html import escape
from typing import Any

from apps.web.texts import Texts
from flows.background import BackgroundRun
from flows.progress import Board, Step, clock, read_progress
from flows.report import picture_url
from flows.run_table import points, step_runs
from glm.config import load_params
from glm.evaluation.curves import draw_curves

MARKS = {"waiting": "○", "running": "▶", "ran": "✓", "cached": "=", "failed": "✗", "stopped": "■"}


def status_html(run: BackgroundRun, text: Texts) -> str:
    """The state of a run and of each of its steps."""
    state = run.state()
    badge = f"<span class='state {state}'>{escape(text(f'state.{state}'))}</span>"
    head = f"<div class='run-head'>{badge} {escape(run.name)}</div>"
    board = run.board()
    if board is None:
        waits = f"<p class='note'>{escape(text('train.preparing'))}</p>" if state == "running" else ""
        return head + waits
    at_work = state in ("running", "stopping")
    rows = "".join(_step_html(step, board, at_work, text) for step in board.steps)
    left = ""
    if at_work:
        gone = clock(time.monotonic() - board.started)
        left = f"<p class='note'>{escape(text('train.clock', gone=gone, left=clock(board.remaining())))}</p>"
    return f"{head}<table class='board'>{rows}</table>{left}"


def _step_html(step: Step, board: Board, at_work: bool, text: Texts) -> str:
    state = step.state
    if state == "running" and not at_work:  # its process is gone without a word
        state = "failed"
    bar, note = "", ""
    if state == "running":
        said = read_progress(board.file)
        done, total = said.get("done", 0), said.get("total", 0)
        width = f"width:{100 * done / total:.1f}%" if total else ""
        bar = f"<div class='bar{'' if total else ' pulse'}'><div style='{width}'></div></div>"
        note = f"{done}/{total} {said['text']}" if total else said.get("text", "")
        seconds = clock(time.monotonic() - step.started)
    elif state == "waiting":
        seconds = f"~{clock(step.guess)}" if step.guess else ""
    else:
        seconds = clock(step.seconds)
        note = text("train.cached") if state == "cached" else ""
    cells = f"<td>{MARKS[state]}</td><td class='name'>{escape(step.name)}</td><td class='time'>{seconds}</td>"
    return f"<tr class='step {state}'>{cells}<td class='work'>{bar}<span class='note'>{escape(note)}</span></td></tr>"


def log_html(run: BackgroundRun) -> str:
    """The end of the log; the style keeps its last line in sight."""
    return f"<pre class='log'><code>{escape(run.log_tail())}</code></pre>"


def curves_html(run: BackgroundRun, drawn: Any) -> tuple[str | None, Any]:
    """The curves of the step that began last, and what they show; no new picture where `drawn` says it is shown."""
    board = run.board()
    if board is None or board.parent_run is None:
        return ("", None) if drawn else (None, drawn)
    params = load_params()
    for step, run_id in reversed(step_runs(params, board.parent_run).items()):
        found = points(params, run_id)
        if not found:
            continue
        shown = (run_id, max(found), len(found))
        if shown == drawn:
            return None, drawn
        picture = picture_url(draw_curves(found, step))
        return f"<img class='curves' alt='{escape(step)}' src='{picture}'>", shown
    return (None, drawn)
