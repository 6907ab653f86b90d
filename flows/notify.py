"""Tell somebody how a flow ended: a JSON message to a webhook. A webhook that does not answer never fails a run."""

import os
import re
from typing import Any

import httpx
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging import get_logger
from prefect.settings import PREFECT_UI_URL

from flows import ROOT
from glm.config import load_params
from glm.errors import InputError

WEBHOOK = "GLMFLOW_WEBHOOK_URL"  # environment variable; an address that is a secret does not belong in params.yaml
SECONDS = 10.0


def notify(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A flow's hook on its end: post flow, run, state and message to the webhook, if there is one.

    `text` is the same in one line, which is what chat services show (Slack, Mattermost, DingTalk's bridges).
    """
    url = webhook()
    if not url:
        return
    page = PREFECT_UI_URL.value()
    message = {
        "flow": flow.name,
        "run": flow_run.name,
        "run_id": str(flow_run.id),
        "state": state.name,
        "message": state.message or "",
        "parameters": flow_run.parameters,
        "page": f"{page}/runs/flow-run/{flow_run.id}" if page else None,
        "text": " ".join(filter(None, [f"{flow.name} {flow_run.name}: {state.name}.", first_line(state.message)])),
    }
    try:
        httpx.post(url, json=message, timeout=SECONDS).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        text = re.sub(r"https?://\S+", "<the webhook>", str(error))  # its address may be a secret
        get_logger("notify").warning("Nobody was told how the run ended: %s", text)


def webhook() -> str | None:
    """GLMFLOW_WEBHOOK_URL, else tracking.webhook of params.yaml; none if the parameters are what failed."""
    if WEBHOOK in os.environ:
        return os.environ[WEBHOOK] or None
    try:
        return load_params(ROOT / "params.yaml").tracking.webhook
    except InputError:
        return None


def first_line(text: str | None) -> str:
    """The first line of a message."""
    return (text or "").partition("\n")[0]
