"""New data as Prefect's event `glmflow.data.changed`, at which an automation (prefect.yaml) runs `retrain/weekly`.

glmflow data changed data/feedback/today.jsonl     say so once, from a script, a hook or cron
glmflow data watch                                 say so for each new file in data/; `make deploy` starts it
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from prefect import get_client
from prefect.events import Event
from prefect.settings import PREFECT_API_URL

from flows import ROOT
from flows.server import is_up
from glm.errors import InputError
from glm.files import write_json

EVENT = "glmflow.data.changed"
RESOURCE = {"prefect.resource.id": "glmflow.data"}
LOOK_SECONDS = 10.0

SEEN = ROOT / ".prefect" / "data-seen.json"

Files = dict[str, tuple[int, int]]  # size and time of change of each file


def emit(files: Sequence[str]) -> None:
    """Tell the Prefect server that data files are new.

    Raises:
        InputError: no server answers, or it does not take the word.
    """
    url = PREFECT_API_URL.value()
    if not url or not is_up(url):
        raise InputError(f"no Prefect server answers at {url or 'PREFECT_API_URL'}; `make deploy` starts one")
    event = Event.model_validate({"event": EVENT, "resource": RESOURCE, "payload": {"files": list(files)}})
    try:
        with get_client(sync_client=True) as client:
            # not by emit_event, which sends in a thread of its own and tells nobody that it could not
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
    except httpx.HTTPError as error:
        raise InputError(f"Prefect at {url} was not told: {error}") from None


def watch(folder: Path, seconds: float = LOOK_SECONDS) -> None:
    """Look at `folder` every so many seconds and `emit` its new files, once they have stopped growing.

    New are those that `remember` did not note, also from a time when nobody watched. One that grows later is not: for
    that the schedule is there.
    """
    known = remember(folder)
    before = look(folder)
    while True:
        time.sleep(seconds)
        now = look(folder)
        if new := settled(known, before, now):
            try:
                emit(new)
                known |= set(new)
                write_json(SEEN, sorted(known))
                print(f"new data: {', '.join(new)}", flush=True)
            except InputError as error:
                print(f"{error}; trying again", flush=True)
        before = now


def remember(folder: Path) -> set[str]:
    """The files that are not new; at the first time all that are there."""
    if not SEEN.exists():
        write_json(SEEN, sorted(look(folder)))
    return set(json.loads(SEEN.read_text(encoding="utf-8")))


def look(folder: Path) -> Files:
    """Every file below a folder but hidden ones."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            status = path.stat()
            seen[str(path.relative_to(ROOT))] = (status.st_size, status.st_mtime_ns)
    return seen


def settled(known: set[str], before: Files, now: Files) -> list[str]:
    """The files that are not `known` and did not change between two looks."""
    return [name for name, state in now.items() if name not in known and before.get(name) == state]
