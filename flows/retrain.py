"""The flow `retrain`: new data in, the pipeline, the gate; a new champion or not. Without new data it ends in seconds.

    python -m flows.retrain                              now, on this machine; --force also without new data
    prefect deployment run retrain/weekly                after `make deploy`, which also makes it run
        by its schedule                                  paused: prefect deployment schedule ls retrain/weekly
        when a new file appears below data/              Prefect's automation of the event glmflow.data.changed

It works on the last commit in a workspace of its own, as every run of a deployment. The state it ends in says what came
of it: "No new data", "Promoted", "Refused" (the gate said no, which is no failure), "Unchanged" (the new data made the
very model that is the champion) or "Awaiting approval".
"""

import argparse
import sys
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import ROOT
from flows.incoming import bring_in
from flows.notify import notify, notify_waiting
from flows.promotion import AWAITING, ask, can_be_suspended, gate_version, safety_words, waiting_for_approval
from flows.publish import check_hub
from flows.rlhf_pipeline import run_stages
from flows.terminal import exit_status, in_terminal
from flows.workspace import keep, parse_overrides, restore, uncommitted, worktree
from glm.config import Params, load_params
from glm.errors import InputError
from tasks.inputs import check_inputs

if TYPE_CHECKING:
    from mlflow.entities import Run


@flow(
    name="retrain",
    on_completion=[notify],
    on_failure=[notify],
    on_crashed=[notify],
    on_cancellation=[notify],
)
def retrain(force: bool = False, overrides: dict[str, Any] | None = None) -> State[Any]:
    """Retrain if data, code or parameters are not those of the last retraining or of the champion; promote or refuse.

    Args:
        force: also without new data.
        overrides: dotted names of params.yaml and their values, as of `rlhf-pipeline`.
    """
    params = load_params(ROOT / "params.yaml", overrides)
    check_hub(params)  # before hours are spent on what could not be sent
    if waiting := waiting_for_approval(params):  # this run was suspended and is resumed
        return ask(params, *waiting)
    if files := uncommitted():
        get_run_logger().warning("This run uses the last commit, without the changes in %s", ", ".join(files))
    with worktree(flow_run.name, overrides or {}) as root:
        params = load_params(root / "params.yaml")
        inputs = collect(str(root))
        if (known := already_retrained(params, inputs)) and not force:
            get_run_logger().info(known)
            return Completed(name="No new data", message=known)
        with chdir(root):
            check_inputs(params)
            safety_words(params)  # the gate wants them at the end
        restore(root)
        summary = run_stages(root, flow_run.name, ours=[params.data.dataset_dir])
        state = gate_version(root, summary["version"], summary["parent_run"])
        keep(root, flow_run.name)
    # Asked here and not in the workspace: the process of a suspended run ends.
    waiting = waiting_for_approval(params) if can_be_suspended() else None
    if not waiting:
        return state
    notify_waiting(state.message or "")
    return ask(params, *waiting)


@task(name="collect", task_run_name="collect", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5)
def collect(root: str) -> str:
    """Bring new data into the workspace. Returns the hash of all that the pipeline starts from."""
    from tasks.record import inputs_hash

    params = load_params(Path(root) / "params.yaml")
    for line in bring_in(Path(root), params.data, lambda: revisions_before(params)):
        get_run_logger().info(line)
    with chdir(root):
        return inputs_hash(params)


def already_retrained(params: Params, inputs: str) -> str:
    """Which model was made from the same data, code and parameters; "" if neither champion nor last retraining was."""
    from flows.champion import CHAMPION
    from tasks.tracking import open_store

    client, _ = open_store(params.tracking.experiment)
    name = params.promote.model_name
    for version in client.search_model_versions(f"name = '{name}' AND tags.`glmflow.inputs` = '{inputs}'"):
        if CHAMPION in client.get_model_version(name, version.version).aliases:
            return f"data, code and parameters are those of the champion, version {version.version}"
    run = last_retraining(params)
    if run and run.data.tags.get("glmflow.inputs") == inputs:
        word = run.data.tags["glmflow.gate"]
        last = f"data, code and parameters are those of the last retraining, {run.info.run_name} ({word})"
        if word == AWAITING:
            return f'{last}; glmflow promote --run {run.info.run_id} --reason "…" makes it the champion'
        return f"{last}; with other bounds, --force asks the gate again"
    return ""


def last_retraining(params: Params) -> "Run | None":
    """The MLflow run of the last retraining that came to a decision."""
    from tasks.tracking import open_store

    client, experiment_id = open_store(params.tracking.experiment)
    decided = "tags.`glmflow.gate` LIKE '%' AND attributes.status = 'FINISHED'"
    runs = client.search_runs([experiment_id], decided, order_by=["start_time DESC"], max_results=1)
    return runs[0] if runs else None


def revisions_before(params: Params) -> dict[str, str]:
    """The hub commit of each dataset at the last retraining."""
    from tasks.record import read_record
    from tasks.tracking import open_store

    run = last_retraining(params)
    if run is None:
        return {}
    try:
        sources = read_record(open_store(params.tracking.experiment)[0], run.info.run_id)["sources"]
    except InputError:  # its files are gone from the store
        return {}
    entries = {name: source["entry"] for name, source in sources.items()}
    return {name: entry["revision"] for name, entry in entries.items() if "revision" in entry}


def main() -> int:
    """The command line. Returns the exit status: 0 whatever the gate says, 1 a stage failed, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description="Retrain if there is new data.")
    parser.add_argument("--force", action="store_true", help="also without new data")
    parser.add_argument(
        "-S", "--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides",
        help="override a name of params.yaml, such as promote.approval=true",
    )  # fmt: skip
    arguments = parser.parse_args()
    return exit_status(lambda: run_command(arguments), "Stopped. Nothing is left running.")


def run_command(arguments: argparse.Namespace) -> int:
    """Retrain as the command line asks for."""
    overrides = parse_overrides(arguments.overrides)
    load_params(ROOT / "params.yaml", overrides)
    with in_terminal():
        state = retrain(arguments.force, overrides, return_state=True)
        state.result()  # raises what the flow raised
    print(f"{state.name}: {state.message}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
