"""`glmflow doctor`: is this machine fit for a run, and what is to be done if not."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

GIB = 2**30
ENOUGH_MEMORY = 4 * GIB  # the embedded default takes less than 3
ENOUGH_DISK = 5 * GIB
MARKS = {"ok": "[green]ok  [/green]", "warning": "[yellow]look[/yellow]", "fault": "[red]bad [/red]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    state: Literal["ok", "warning", "fault"]
    what: str
    advice: str = ""


def main() -> int:
    """Print all findings. Returns the exit status: 1 if one is a fault."""
    from rich.console import Console

    console = Console(highlight=False)
    faults = 0
    for finding in examine():
        faults += finding.state == "fault"
        console.print(f"{MARKS[finding.state]}  {finding.what}", soft_wrap=True)
        if finding.advice:
            console.print(f"      → {finding.advice}", soft_wrap=True)
    console.print("Nothing is wrong." if not faults else f"{faults} to be mended.")
    return int(faults > 0)


def examine() -> Iterator[Finding]:
    """Look at everything, the quick things first."""
    yield python_version()
    yield from packages(Path("requirements.lock"))
    yield memory()
    yield disk()
    yield from gpus()
    yield parameters()
    yield from tracked_data()
    yield tracking_store()
    yield prefect_server()


def python_version() -> Finding:
    found = platform.python_version()
    return Finding("ok", f"Python {found} ({sys.executable})")


def packages(lock: Path) -> Iterator[Finding]:
    """Installed versions against the lock."""
    if not lock.exists():
        yield Finding("fault", f"{lock}: missing", "run this in the project's folder")
        return
    missing, other = [], []
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = [line.strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    for name, version in pins:
        try:
            found = metadata.version(name).partition("+")[0]  # torch says for which CUDA it was built
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != version:
            other.append(f"{name} {found}, locked {version}")
    advice = "`make .venv/ready` after `rm .venv/ready` installs what the lock says"
    if missing:
        yield Finding("fault", f"packages missing: {', '.join(missing)}", advice)
    if other:
        yield Finding("warning", f"packages of other versions: {'; '.join(other)}", advice)
    if not (missing or other):
        yield Finding("ok", f"{len(pins)} packages as in {lock}")


def memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    what = f"{free / GIB:.1f} GiB of memory free"
    if free < ENOUGH_MEMORY:
        return Finding("warning", what, "the embedded default wants 4 GiB, a 6B model in bfloat16 about 14")
    return Finding("ok", what)


def disk() -> Finding:
    free = shutil.disk_usage(".").free
    what = f"{free / GIB:.0f} GiB of disk free here"
    if free < ENOUGH_DISK:
        return Finding("warning", what, "`dvc gc --workspace` removes what no commit needs; .worktrees/ may be old")
    return Finding("ok", what)


def gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        said = "; nvidia-smi is here, torch sees none" if shutil.which("nvidia-smi") else ""
        advice = "install a CUDA build of torch that fits the driver" if said else ""
        yield Finding("warning" if said else "ok", f"no GPU{said}: torch {torch.__version__} runs on the CPU", advice)
        return
    for index in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        what = f"GPU {index}: {name}, {free / GIB:.0f} of {whole / GIB:.0f} GiB free"
        busy = free < whole / 2
        yield Finding("warning" if busy else "ok", what, "`nvidia-smi` says who has the rest" if busy else "")


def parameters() -> Finding:
    from glm.config import load_params
    from glm.errors import InputError

    try:
        load_params()
    except (InputError, OSError) as error:
        return Finding("fault", f"params.yaml: {error}", "`glmflow params` explains every knob")
    return Finding("ok", "params.yaml is valid")


def tracked_data() -> Iterator[Finding]:
    """The datasets of params.yaml, and files that DVC tracks and that are not here."""
    from ruamel.yaml import YAML

    from glm.config import load_params
    from glm.data.registry import read_registry
    from glm.errors import InputError
    from glm.files import file_hash

    try:
        data = load_params().data
        uses = (data.text, data.sft, data.reward, data.ppo, data.kto)
        names = list(dict.fromkeys(name for use in uses for name in use))
        read_registry(data.dataset_dir, names)
        yield Finding("ok", f"datasets registered: {', '.join(names)}")
    except (InputError, OSError) as error:
        yield Finding("fault", str(error), "`glmflow data check NAME` looks at a dataset")
        return
    pointers = sorted(Path(data.dataset_dir).rglob("*.dvc"))
    absent, changed = [], []
    for pointer in pointers:
        for out in YAML(typ="safe").load(pointer).get("outs", []):
            path = pointer.parent / out["path"]
            if not path.exists():
                absent.append(str(path))
            elif path.is_file() and file_hash(path, "md5") != out.get("md5"):
                changed.append(str(path))
    if absent:
        yield Finding("fault", f"tracked by DVC and not here: {', '.join(absent)}", "`dvc checkout`, else `dvc pull`")
    if changed:
        yield Finding(
            "warning", f"not what its .dvc file says: {', '.join(changed)}", "`dvc add` it, or `dvc checkout`"
        )
    if pointers and not (absent or changed):
        yield Finding("ok", f"{len(pointers)} data files as DVC tracks them")


def tracking_store() -> Finding:
    from tasks.tracking import main_checkout, store_uri

    uri = store_uri()
    if uri.startswith(("http://", "https://")):
        if answers(f"{uri.rstrip('/')}/health"):
            return Finding("ok", f"MLflow answers at {uri}")
        return Finding("fault", f"MLflow does not answer at {uri}", "start it, or unset MLFLOW_TRACKING_URI")
    folder = main_checkout() / "mlruns"
    writable = os.access(folder if folder.exists() else folder.parent, os.W_OK)
    if not writable:
        return Finding(
            "fault", f"{folder}: not writable", "the runs are kept there; set MLFLOW_TRACKING_URI to another"
        )
    return Finding("ok", f"MLflow's store: {uri}" + ("" if folder.exists() else " (the first run makes it)"))


def prefect_server() -> Finding:
    """Prefect's server is needed for schedules alone: a run brings its own."""
    url = os.environ.get("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    if answers(f"{url}/health"):
        return Finding("ok", f"Prefect answers at {url}")
    if "PREFECT_API_URL" in os.environ:
        return Finding("fault", f"Prefect does not answer at {url}", "unset PREFECT_API_URL, or start that server")
    return Finding("ok", "no Prefect server (`make deploy` starts one, for schedules; a run does without)")


def answers(url: str) -> bool:
    """Whether a server answers at `url` within two seconds."""
    import httpx

    try:
        return httpx.get(url, timeout=2, verify=not url.startswith("http:")).is_success
    except httpx.HTTPError:
        return False
