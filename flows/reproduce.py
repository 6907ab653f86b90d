"""Making a registered model again from what was recorded of it, and saying whether, and why not, it is the same.

The run takes place in a clone of this repository with nothing of its caches: every step computes. Code comes from the
recorded commit and patch, parameters from the recorded params.yaml, data from git or, by md5, from DVC's cache here or
the remote. On the CPU of an equal machine all bytes must be equal but those of runs/*.json: times and run ids.
"""

import shutil
import subprocess
import sys
import tempfile
from contextlib import chdir
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flows import ROOT, guard
from flows.dvc_repair import cached
from flows.dvc_stage import cache_folder, stage_environment
from flows.lineage import find_run
from flows.report import read_json
from flows.workspace import FOLDER as WORKSPACES
from flows.workspace import command, dvc
from glm.config import load_params
from glm.errors import InputError
from tasks.lineage import content_hash, flatten, machine_tags
from tasks.record import FOLDER, read_lock, read_record
from tasks.tracking import finish_parent_run, open_store, start_parent_run, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def reproduce(target: str, console: Console) -> int:
    """Make the model `target` again and print the comparison. Returns 0 if all is equal, 1 if not or if it failed.

    Raises:
        InputError: nothing was recorded with the target, or the code or data is not to be had any more.
    """
    client, experiment_id = open_store(load_params(ROOT / "params.yaml").tracking.experiment)
    run_id, _ = find_run(client, experiment_id, target)
    record = read_record(client, run_id)
    WORKSPACES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORKSPACES, prefix="reproduce-") as temporary:
        recorded = Path(client.download_artifacts(run_id, FOLDER, temporary))
        root = Path(temporary) / "checkout"
        check_out(root, record, recorded)
        bring_data(root, record, recorded)
        machine = recorded_machine(client, record)
        reasons = differences_of_machine(machine, recorded / "requirements.lock")
        if not run_pipeline(root, machine, target, record.get("until"), console):
            return 1
        rows = compare(read_lock(recorded / "dvc.lock"), read_lock(root / "dvc.lock"))
        metrics = compare_metrics(recorded / "metrics", root / "metrics")
    return show(target, record, rows, metrics, reasons, console)


def check_out(root: Path, record: dict[str, Any], recorded: Path) -> None:
    """Clone this repository to `root` at the recorded commit, with the recorded patch and parameters."""
    if record["uncommitted"] and not record["patch"]:
        raise InputError(
            f"trained with uncommitted changes in {', '.join(record['uncommitted'])} that were not kept: it cannot be "
            "made again"
        )
    here = subprocess.run(["git", "cat-file", "-e", f"{record['commit']}^{{commit}}"], cwd=ROOT, capture_output=True)
    if here.returncode:
        raise InputError(f"commit {record['commit']} is not in this repository: git fetch it from where it was made")
    command(["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(root)], ROOT)
    command(["git", "checkout", "--quiet", "--detach", record["commit"]], root)
    if record["patch"]:
        command(["git", "apply", str((recorded / "uncommitted.patch").resolve())], root)
    shutil.copyfile(recorded / "params.yaml", root / "params.yaml")
    local = ROOT / ".dvc" / "config.local"
    if local.exists():  # remotes and their passwords; the cache must not be this one's
        shutil.copy(local, root / ".dvc" / "config.local")
        dvc(root, "config", "--local", "cache.dir", str(root / ".dvc" / "cache"))


def bring_data(root: Path, record: dict[str, Any], recorded: Path) -> None:
    """Put every recorded file of data that the commit does not hold as it was into `root`.

    The fetch step's output holds a copy of each used file, so that DVC knows it by its md5.

    Raises:
        InputError: a file that a dataset of the run came from is neither in git nor in DVC's cache nor at its remote.
    """
    folder = root / record["data"]["folder"]
    here = cache_folder(ROOT)
    missing = {
        name: md5
        for name, md5 in record["data"]["files"].items()
        if not (folder / name).is_file() or content_hash(folder / name) != md5
    }
    asked = False
    for name, md5 in missing.items():
        source = cached(here, md5)
        if not source.exists() and not asked:
            asked = True
            fetch_from_remote(root, recorded)
        if not source.exists():
            source = cached(root / ".dvc" / "cache", md5)
        if not source.exists():
            raise InputError(
                f"{record['data']['folder']}/{name} (md5 {md5}) is neither in commit {record['commit'][:12]} nor in "
                "DVC's cache here or at the remote: `dvc pull` where it still is, then `dvc push`"
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        shutil.copyfile(source, folder / name)
    for path in [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]:
        if path.relative_to(folder).as_posix() not in record["data"]["files"]:
            path.unlink()  # a file that the commit holds and the run did not have


def fetch_from_remote(root: Path, recorded: Path) -> None:
    """Ask the remote, if there is one, for what the fetch step brought and for what .dvc files name."""
    if not dvc(root, "remote", "list").strip():
        return
    shutil.copyfile(recorded / "dvc.lock", root / "dvc.lock")
    pointers = [str(path.relative_to(root)) for path in root.rglob("*.dvc") if path.is_file()]
    subprocess.run(
        [sys.executable, "-m", "dvc", "fetch", "fetch", *pointers],
        cwd=root, env=stage_environment(), capture_output=True,
    )  # fmt: skip
    (root / "dvc.lock").unlink()


def recorded_machine(client: "MlflowClient", record: dict[str, Any]) -> dict[str, str]:
    """The machine that the last of the recorded steps ran on; empty where the store does not know its run."""
    from mlflow.exceptions import MlflowException

    run_id = next((run["run_id"] for run in reversed(list(record["runs"].values()))), None)
    try:
        tags: dict[str, str] = client.get_run(run_id).data.tags if run_id else {}
    except MlflowException:
        return {}
    return {name: value for name, value in tags.items() if name.startswith("machine.")}


def differences_of_machine(machine: dict[str, str], lock: Path) -> list[str]:
    """What here is not as it was when the model was made: it may explain a difference."""
    now = machine_tags()
    said = []
    for name, value in machine.items():
        if name in now and name not in ("machine.memory_gb", "machine.threads") and now[name] != value:
            said.append(f"{name.removeprefix('machine.')} is {now[name]}, was {value}")
    for line in lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []:
        package, pinned, wanted = line.partition("==")
        if pinned and (found := installed(package)) != wanted.strip():
            said.append(f"package {package} is {found or 'not installed'}, the recorded lock says {wanted}")
    return said


def installed(package: str) -> str | None:
    """The version of an installed package, without a build's local part."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def run_pipeline(root: Path, machine: dict[str, str], target: str, until: str | None, console: Console) -> bool:
    """Compute the steps in `root` up to `until`, with as many threads as then, without any cache. False: one failed."""
    (root / "dvc.lock").unlink(missing_ok=True)
    with chdir(root):
        params = load_params("params.yaml")
        parent = start_parent_run(params, f"reproduce {target}", {"glmflow.reproduces": target})
    environment = stage_environment() | {"MLFLOW_TRACKING_URI": store_uri(), "GLMFLOW_PARENT_RUN_ID": parent or ""}
    if "machine.threads" in machine:
        environment["OMP_NUM_THREADS"] = machine["machine.threads"]
    words = [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache", *([until] if until else [])]
    with guard.running(words, cwd=root, env=environment) as process:
        for line in process.stdout or ():
            console.print(line.rstrip(), highlight=False, markup=False, style="dim")
    finished = process.returncode == 0
    with chdir(root):
        finish_parent_run(parent, "FINISHED" if finished else "FAILED", [])
    return finished


def compare(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Path, hash then and hash now of every output but the records of who made it when, in the order of the steps."""
    hashes = [
        {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", [])} for lock in (then, now)
    ]
    paths = [path for path in {**hashes[0], **hashes[1]} if not path.startswith("runs/")]
    return [(path, hashes[0].get(path, "absent"), hashes[1].get(path, "absent")) for path in paths]


def compare_metrics(then: Path, now: Path) -> list[tuple[str, Any, Any]]:
    """Name, value then and value now of each metric that differs."""
    values = [flatten({path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}) for folder in (then, now)]
    names = {**values[0], **values[1]}
    return [(n, values[0].get(n), values[1].get(n)) for n in names if values[0].get(n) != values[1].get(n)]


def show(
    target: str,
    record: dict[str, Any],
    rows: list[tuple[str, str, str]],
    metrics: list[tuple[str, Any, Any]],
    reasons: list[str],
    console: Console,
) -> int:
    """Print the comparison. Returns the exit status."""
    table = Table("output", "then", "now", "")
    for path, then, now in rows:
        table.add_row(path, then[:16], now[:16], "equal" if then == now else "[bold red]differs[/bold red]")
    console.print(table)
    for name, then, now in metrics:
        console.print(f"{name}: {then} then, {now} now")
    different = [path for path, then, now in rows if then != now]
    if record["uncommitted"]:
        console.print(f"The code includes recorded uncommitted changes in {', '.join(record['uncommitted'])}.")
    for fault in record["faults"]:
        console.print(f"The record has a fault: {fault}")
    if not different:
        console.print(f"{target}: all {len(rows)} outputs are equal, bit by bit.")
        return 0
    console.print(f"{target}: {len(different)} of {len(rows)} outputs differ, first {different[0]}.")
    for reason in reasons or ["Nothing that was recorded of machine and packages differs."]:
        console.print(f"  {reason}", highlight=False)
    return 1
