"""New data as Prefect's event `glmflow.data.changed`, at which an automation (prefect.yaml) runs `retrain/weekly`.

glmflow data changed data/feedback/today.jsonl     say so once, from a script, a hook or cron
glmflow data watch                                 say so for each new file in data/; `make deploy` starts it
"""

import time
from collections.abc import Sequence
from pathlib import Path

from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL

from flows import ROOT
from flows.server import is_up
from glm.errors import InputError

EVENT = "glmflow.data.changed"
RESOURCE = {"prefect.resource.id": "glmflow.data"}
LOOK_SECONDS = 10.0

Seen = dict[str, tuple[int, int]]  # size and time of change of each file


def emit(files: Sequence[str]) -> None:
    """Tell the Prefect server that data files are new.

    Raises:
        InputError: no server answers.
    """
    url = PREFECT_API_URL.value()
    if not url or not is_up(url):
        raise InputError(f"no Prefect server answers at {url or 'PREFECT_API_URL'}; `make deploy` starts one")
    emit_event(EVENT, resource=RESOURCE, payload={"files": list(files)})
    EventsWorker.drain_all(timeout=30)


def watch(folder: Path, seconds: float = LOOK_SECONDS) -> None:
    """Look at `folder` every so many seconds and `emit` its new files, once they have stopped growing.

    Files that were there at the start are not new, nor is one that grows later: for those the schedule is there.
    """
    known = look(folder)
    before = known
    while True:
        time.sleep(seconds)
        now = look(folder)
        if new := settled(known, before, now):
            try:
                emit(new)
                known = known | {name: now[name] for name in new}
                print(f"new data: {', '.join(new)}", flush=True)
            except InputError as error:
                print(f"{error}; trying again", flush=True)
        before = now


def look(folder: Path) -> Seen:
    """Every file below a folder but hidden ones."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            status = path.stat()
            seen[str(path.relative_to(ROOT))] = (status.st_size, status.st_mtime_ns)
    return seen


def settled(known: Seen, before: Seen, now: Seen) -> list[str]:
    """The files that are not `known` and did not change between two looks."""
    return [name for name, state in now.items() if name not in known and before.get(name) == state]
