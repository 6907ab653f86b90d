"""When and in what order: Prefect flows over the stages of dvc.yaml. Nothing heavy is imported here.

Prefect reads its settings while it is imported, so they are put in place here, before any module of this package does
that: its home is this project's `.prefect/` (whatever the user's own profile says), and telemetry is off.
"""

import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect"))
os.environ.setdefault("PREFECT_PROFILES_PATH", str(ROOT / ".prefect" / "profiles.toml"))
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")


def _stopped(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Stopped before it began.\n")
    os._exit(128 + number)


# `python -m flows.<flow>`: Python says so in argv while it looks for the module. Seconds of imports follow, in which
# Ctrl-C has nothing to undo (until `exit_status` in terminal.py), and in which looking for garbage after each 700 new
# objects takes a quarter of the time and finds none.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, _stopped)
    gc.set_threshold(200_000, 20, 100)
