"""When and in what order: Prefect flows over the stages of dvc.yaml. Nothing heavy is imported here.

Prefect reads its settings while it is imported, so they are put in place here, before any module of this package does
that: its home is this project's `.prefect/` (whatever the user's own profile says), and telemetry is off.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect"))
os.environ.setdefault("PREFECT_PROFILES_PATH", str(ROOT / ".prefect" / "profiles.toml"))
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
