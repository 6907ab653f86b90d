"""The flow `rlhf-pipeline`: the stages of dvc.yaml in order, each a Prefect task that DVC executes.

    python -m flows.rlhf_pipeline                                   in the checkout, as `make run` does
    python -m flows.rlhf_pipeline -S ppo.learning_rate=2e-5         in a workspace of its own, kept as a DVC experiment
    python -m flows.rlhf_pipeline recipes/ads_generation.yaml       the same with the overrides and the end of a recipe
    python -m flows.rlhf_pipeline --until evaluate_sft              the first steps only; nothing is registered
    python -m flows.rlhf_pipeline --serve --cron "0 3 * * 0"        wait for runs here, and start one by this schedule
    prefect deployment run rlhf-pipeline/default -p overrides='{"ppo.learning_rate": 2e-5}'      after `make deploy`

Stages are called directly, one after the other: a failed task that was submitted leaves its flow COMPLETED, its
time-out does nothing, and there is one GPU.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from prefect.tasks import Task
from rich.console import Console

from flows import ROOT, report
from flows.arguments import pipeline_parser
from flows.dvc_stage import output_hashes, reproduce, run_cache_key, run_cache_keys
from flows.errors import RefusedError
from flows.interrupt import stop_if_asked
from flows.notify import notify
from flows.progress import Board
from flows.recipes import Recipe, read_recipe
from flows.run_page import write_page
from flows.terminal import exit_status, in_terminal
from flows.workspace import parse_overrides, uncommitted, workspace
from glm.config import load_params
from glm.errors import InputError
from tasks import programs, steps_to
from tasks.inputs import check_inputs

HOUR = 3600.0


@dataclass(frozen=True)
class Plan:
    """How Prefect treats a stage: the seconds it may take, and how often it is tried again after a failure."""

    time_limit: float
    retries: int = 0


# Only what talks to a network is tried again: a training that failed would fail alike.
STAGES = {
    "fetch": Plan(6 * HOUR, retries=2),
    "preprocess": Plan(6 * HOUR),
    "base": Plan(12 * HOUR, retries=2),
    "sft": Plan(168 * HOUR),
    "evaluate_sft": Plan(24 * HOUR),
    "reward": Plan(168 * HOUR),
    "reward_judge": Plan(168 * HOUR),
    "policy": Plan(168 * HOUR),
    "evaluate": Plan(24 * HOUR),
    "export": Plan(6 * HOUR),
}


def not_refused(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Is another try worth it? Not for input that the stage has refused."""
    return not isinstance(state.result(raise_on_failure=False), RefusedError)


@task(
    cache_key_fn=lambda context, inputs: inputs["key"],
    persist_result=True,
    result_serializer="json",
    retry_delay_seconds=5,
    retry_condition_fn=not_refused,
)
def stage(step: str, root: str, time_limit: float, parent_run: str, key: str | None) -> State[Any]:
    """Bring one stage up to date. The task's state says "Cached" if that took no execution of its command.

    `key` is the stage's in DVC's run cache, and so in Prefect's; None: it is not up to date.
    """
    executed = False
    if key is None:
        executed = reproduce(step, Path(root), time_limit, {"GLMFLOW_PARENT_RUN_ID": parent_run})
        key = run_cache_key(step, Path(root))
    data = {"key": key, "outputs": output_hashes(step, Path(root))}
    if executed:
        return Completed(message="DVC executed the stage", data=data)
    return Completed(name="Cached", message="DVC has the outputs: nothing was executed", data=data)


@flow(
    name="rlhf-pipeline",
    on_completion=[notify],
    on_failure=[notify],
    on_crashed=[notify],
    on_cancellation=[notify],
)
def rlhf_pipeline(overrides: dict[str, Any] | None = None, until: str | None = None) -> dict[str, Any]:
    """Every stage from fetch to export; then register the result as challenger.

    Args:
        overrides: dotted names of params.yaml and their values, such as {"ppo.learning_rate": 2e-5}. A run with
            overrides, and every run of a deployment, works on the last commit in a folder of its own; another one works
            in the checkout as it is.
        until: the last step, such as evaluate_sft; nothing is registered then.

    Returns:
        The summary that `flows.report` shows.
    """
    overrides = overrides or {}
    steps = steps_to(until)
    load_params(ROOT / "params.yaml", overrides)  # wrong ones are refused before anything is fetched
    if not overrides and deployment.id is None:
        check(ROOT, until=until)
        return run_stages(ROOT, flow_run.name, until=until)
    if files := uncommitted():
        get_run_logger().warning("This run uses the last commit, without the changes in %s", ", ".join(files))
    with workspace(flow_run.name, overrides, steps if until else ()) as root:
        check(root, until=until)
        return run_stages(root, flow_run.name, until=until) | {"experiment": flow_run.name}


def check(root: Path, overrides: Mapping[str, Any] | None = None, until: str | None = None) -> None:
    """Raise an InputError if the parameters in `root`, or the data and model that they name, are not right."""
    with chdir(root):
        check_inputs(load_params("params.yaml", dict(overrides or {})), steps_to(until))


def run_stages(root: Path, name: str, ours: Sequence[str] = (), until: str | None = None) -> dict[str, Any]:
    """Run the stages in `root`, register the result with its lineage, and report.

    `ours` are paths that the calling flow changed itself: they do not count as uncommitted changes. With `until` that
    is the last step, and nothing is registered.
    """
    steps = steps_to(until)
    keys = run_cache_keys(steps, root)
    board = make_board(steps, root, keys, [] if until else ["register"])
    version = None
    with board.shown(), mlflow_parent(root, name) as (parent_run, done):
        run_steps(steps, root, board, keys, parent_run, done)
        if until:
            record_run(root, parent_run, until)
        else:
            with board.running("register") as line:
                version = register_result(str(root), parent_run, ours)
                line.state = "ran"
        summary = report.collect(root, board.steps, parent_run, version)
        write_report(root, name, parent_run, summary)
        report.publish(root, summary)
    return summary


def write_report(root: Path, name: str, parent_run: str | None, summary: dict[str, Any]) -> None:
    """Write reports/<run>.html in the checkout, for a run in a workspace too, and keep it with the run in MLflow."""
    from tasks.tracking import keep_file

    with chdir(root):
        page = write_page(ROOT / "reports" / f"{name}.html", name, root, summary, load_params("params.yaml"))
    keep_file(parent_run, page)


def make_board(steps: Sequence[str], root: Path, keys: Mapping[str, str], more: Sequence[str] = ()) -> Board:
    """The board of a run of `steps` in `root`, then of what is no stage. The stage `policy` goes by its algorithm."""
    names = programs(load_params(root / "params.yaml").algorithm, steps)
    return Board([*names, *more], root, names[: len(keys)])


def run_steps(
    steps: Sequence[str],
    root: Path,
    board: Board,
    keys: Mapping[str, str],
    parent_run: str | None,
    done: list[str],
) -> None:
    """Run stages in `root`, in order; the name of each is added to `done` when it is. Raises what a stage raised.

    `keys` are those of the first stages, which are up to date (`run_cache_keys`).
    """
    board.parent_run = parent_run
    for step, name in zip(steps, programs(load_params(root / "params.yaml").algorithm, steps), strict=True):
        run = stage.with_options(name=name, task_run_name=name, retries=STAGES[step].retries)
        with board.running(name) as line:
            stop_if_asked()
            key = keys.get(step) or run_cache_key(step, root)
            state = run(step, str(root), STAGES[step].time_limit, parent_run or "", key, return_state=True)
            state.result()
            line.state = "cached" if state.name == "Cached" else "ran"
        done.append(name)


@task(name="register", task_run_name="register", cache_policy=NO_CACHE)
def register_result(root: str, parent_run: str | None, ours: Sequence[str] = ()) -> str:
    """Register the exported model in MLflow as challenger, once for each export, and record what it was made from.

    Returns the version's number.
    """
    from flows.registry import register
    from tasks.record import keep_record

    with chdir(root):
        params = load_params("params.yaml")
        version = register("models/export", report.read_json(Path("runs/export.json"))["run_id"], params)
        keep_record(params, version, parent_run, ours)
    return version


def record_run(root: Path, parent_run: str | None, until: str) -> None:
    """Record what a run was made from whose result is not registered."""
    from tasks.record import keep_run_record

    with chdir(root):
        keep_run_record(load_params("params.yaml"), parent_run, until)


@contextmanager
def mlflow_parent(
    root: Path, name: str, tags: Mapping[str, str] | None = None, key: str | None = None
) -> Iterator[tuple[str | None, list[str]]]:
    """The MLflow run whose children are the stages' runs (None if MLflow is out of order), and the steps done so far.

    It is closed as FINISHED, FAILED or KILLED. In a workspace it is named and tagged as the DVC experiment. `tags` and
    `key` as for `start_parent_run`.
    """
    from tasks.tracking import finish_parent_run, start_parent_run  # MLflow takes 2 s to import

    known = {"glmflow.flow_run_id": str(flow_run.id)}
    if root != ROOT:
        known["glmflow.dvc_exp_name"] = name
    with chdir(root):
        run_id = start_parent_run(load_params("params.yaml"), name, known | dict(tags or {}), key)
    done: list[str] = []
    status = "KILLED"
    try:
        yield run_id, done
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        with chdir(root):
            reports = [f"reports/{step}" for step in ("evaluate_sft", "evaluate") if step in done]
            finish_parent_run(run_id, status, done, reports)


def main(words: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 done, 1 a stage failed, 2 wrong input, 130 stopped."""
    arguments = pipeline_parser().parse_args(words)
    stopped = "Stopped. Nothing is left running; the next run goes on from the last finished step."
    return exit_status(lambda: run_command(arguments), stopped)


def run_command(arguments: argparse.Namespace) -> int:
    """What the command line asks for."""
    recipe = read_recipe(arguments.recipe) if arguments.recipe else Recipe({})
    overrides = recipe.overrides | parse_overrides(arguments.overrides)
    until = arguments.until or recipe.until
    check(ROOT, overrides, until)
    if overrides and (files := uncommitted()):
        raise InputError(
            f"a run with overrides uses the last commit, without your changes in {', '.join(files)}: commit first"
        )
    if arguments.serve:
        return serve(arguments.cron)
    with in_terminal():
        summary = rlhf_pipeline(overrides, until)
    report.show(summary, Console())
    return 0


def serve(cron: str | None) -> int:
    """Run what is started as rlhf-pipeline/served, one run at a time, until this process is stopped."""
    from flows.deploy import ensure_server

    try:
        with temporary_settings({PREFECT_API_URL: ensure_server()}):
            rlhf_pipeline.serve(name="served", cron=cron, limit=1, pause_on_shutdown=False)
    except* KeyboardInterrupt:
        print("Stopped serving; `make stop` stops the server too.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
