"""Tell somebody how a flow ended, or that it waits for a person: a JSON message to a webhook.

A webhook that does not answer never fails a run.
"""

import os
import re
from typing import Any

import httpx
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging import get_logger
from prefect.runtime import flow_run as runtime
from prefect.settings import PREFECT_UI_URL

from flows import ROOT
from glm.config import load_params
from glm.errors import InputError

WEBHOOK = "GLMFLOW_WEBHOOK_URL"  # environment variable; an address that is a secret does not belong in params.yaml
SECONDS = 10.0


def notify(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A flow's hook on its end: post flow, run, state and message to the webhook, if there is one."""
    post(flow.name, flow_run.name, str(flow_run.id), flow_run.parameters, state.name or "", state.message or "")


def notify_waiting(message: str) -> None:
    """The same from within a run that is about to be suspended: Prefect has no hook for that."""
    post(runtime.flow_name, runtime.name, str(runtime.id), runtime.parameters, "Awaiting approval", message)


def post(flow: str, run: str, run_id: str, parameters: dict[str, Any], state: str, text: str) -> None:
    """Send the message.

    Its `text` is the same in one line, which is what chat services show (Slack, Mattermost, DingTalk's bridges).
    """
    url = webhook()
    if not url:
        return
    page = PREFECT_UI_URL.value()
    message = {
        "flow": flow,
        "run": run,
        "run_id": run_id,
        "state": state,
        "message": text,
        "parameters": parameters,
        "page": f"{page}/runs/flow-run/{run_id}" if page else None,
        "text": " ".join(filter(None, [f"{flow} {run}: {state}.", first_line(text)])),
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


def first_line(text: str) -> str:
    """The first line of a message."""
    return text.partition("\n")[0]
