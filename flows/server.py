"""The Prefect API that a flow talks to: the server of `make deploy` if it is up, else one for the time of this process.

Prefect would start a temporary server by itself, but that one outlives kill -9.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import ROOT, guard
from flows.errors import ServerError
from flows.interrupt import interruptible

WITHOUT_SERVER = "GLMFLOW_WITHOUT_PREFECT_SERVER"  # environment variable: the run has found its server to be broken
STARTUP_SECONDS = 180  # the first start makes the database: 7 s on an idle machine, more than 40 on a busy small one
LOG = ROOT / ".prefect" / "temporary-server.log"


@contextmanager
def prefect_api() -> Iterator[None]:
    """Within the block, flows find an API.

    It is PREFECT_API_URL, of the environment or of `make deploy`, if that answers; else a server of this process,
    without pages and schedules, on the project's own database.
    """
    # a server that goes away is given up within seconds, not minutes: the run can go on without it
    patience = {PREFECT_CLIENT_MAX_RETRIES: 2}
    deployed = PREFECT_API_URL.value()
    if deployed and WITHOUT_SERVER not in os.environ and is_up(deployed):
        with temporary_settings(patience):
            yield
        return
    if "PREFECT_API_URL" in os.environ:
        print(f"warning: Prefect at {deployed} does not answer: this run is recorded in .prefect/", file=sys.stderr)
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    options = ["--host", "127.0.0.1", "--port", str(port), "--no-ui", "--no-scheduler", "--no-late-runs"]
    command = [sys.executable, "-m", "prefect", "server", "start", *options]
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log, ExitStack() as stack:
        with guard.lock(LOG.with_suffix(".lock")):  # two first starts at once would both make the database
            process = stack.enter_context(guard.running(command, cwd=ROOT, env=os.environ, stdout=log))
            wait_until_up(url, process, LOG)
        with temporary_settings(patience | {PREFECT_API_URL: url}):
            try:
                yield
            except httpx.TransportError:  # it has gone away: nobody to send to
                raise
            except Exception:
                send_rest()
                raise
            send_rest()
        process.terminate()


def send_rest() -> None:
    """Send what Prefect's threads still hold back, logs and events, while there is a server to send it to."""
    APILogWorker.drain_all(timeout=30)
    EventsWorker.drain_all(timeout=30)


def is_up(url: str) -> bool:
    """Does a Prefect API answer at `url`?"""
    try:
        # without the certificates, which take longer to load than a server of this machine to answer
        answer = httpx.get(f"{url}/health", timeout=5, verify=not url.startswith("http:"))
        return answer.status_code == httpx.codes.OK and answer.text == "true"  # not some other program's page
    except httpx.HTTPError:
        return False


def wait_until_up(url: str, process: subprocess.Popen[str], log: Path) -> None:
    """Return once the server answers.

    Raises:
        ServerError: it ended, or did not answer within STARTUP_SECONDS.
    """
    deadline = time.monotonic() + STARTUP_SECONDS
    while not is_up(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"The Prefect server did not start; its output is in {log}")
        interruptible(time.sleep, 0.1)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
