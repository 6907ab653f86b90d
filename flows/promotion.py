"""From challenger to champion: judge both on the same rows, gate, keep the decision, ask a person, move the alias.

The decision is kept where a person looks for it: a table with the flow run (Prefect), tags of the model version and the
folder `promotion/` of the pipeline's run (MLflow), and reports/promotion/<name>-v<version>.md of the checkout. That a
version waits for a person is its tag `gate.decision`; a deployment's run is suspended meanwhile, holds no worker, and
goes on when it is resumed with an `Approval`.
"""

import json
import sys
from collections import deque
from contextlib import chdir
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from flows import ROOT, guard
from flows.dvc_stage import TAIL, stage_environment
from flows.errors import RefusedError, StageError
from flows.gate import Decision, Evidence, decide, read_rows, read_words
from flows.progress import Board, progress_file
from flows.report import read_json, table
from glm.config import Params, load_params
from glm.errors import InputError
from glm.files import write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

JUDGE_SECONDS = 24 * 3600.0
PASSED, REFUSED, AWAITING = "passed", "refused", "awaiting approval"
COLUMNS = ["check", "value", "bound", "passed"]


class Approval(RunInput):
    """What a person answers, in Prefect's pages or by `prefect flow-run resume`."""

    approved: bool
    by: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the gate said of a version, against which champion."""

    version: str
    champion: str | None
    decision: Decision


def gate_version(root: Path, version: str, run_id: str | None) -> State[Any]:
    """Judge the version that lies in `root`, record the decision, and promote it if the gate lets it pass.

    `run_id` is the MLflow run that made or found it.

    Returns the state for the flow to end in: Promoted, Refused, Unchanged, or "Awaiting approval".
    """
    from flows.champion import CHAMPION
    from flows.registry import alias_version
    from tasks.tracking import open_store

    params = load_params(root / "params.yaml")
    client, _ = open_store(params.tracking.experiment)
    name = params.promote.model_name
    champion = alias_version(client, name, CHAMPION)
    if champion == version:
        if run_id:
            client.set_tag(run_id, "glmflow.gate", "unchanged")
        return Completed(name="Unchanged", message=f"{name} version {version} is the champion already")
    board = Board(["judge"], root, [])
    with board.shown(), board.running("judge") as line:
        judge(str(root), f"models:/{name}/{champion}" if champion else None)
        line.state = "ran"
    verdict = Verdict(version, champion, gate(str(root), version, champion))
    waits = verdict.decision.passed and params.promote.approval
    word = AWAITING if waits else PASSED if verdict.decision.passed else REFUSED
    record_decision(client, root, params, verdict, word, run_id)
    state: State[Any]
    if waits:
        message = f'glmflow promote {version} --reason "…" moves the alias'
        state = Completed(name="Awaiting approval", message=f"{name} version {version} passed the gate; {message}")
    elif verdict.decision.passed:
        state = promoted(params, version, champion, "passed the gate", by="gate")
    else:
        state = refused(name, verdict)
    tell_run(params, version)  # last: what was not carried out is no decision, and the next retraining makes it again
    return state


@task(name="judge", task_run_name="judge", cache_policy=NO_CACHE)
def judge(root: str, champion: str | None) -> None:
    """Run `python -m tasks.judge` in `root`, in turn with the stages of all runs."""
    command = [sys.executable, "-m", "tasks.judge", *(["--champion", champion] if champion else [])]
    environment = stage_environment() | {"GLMFLOW_PROGRESS": str(progress_file(Path(root)))}
    output: deque[str] = deque(maxlen=TAIL)
    with (
        guard.lock(ROOT / ".dvc" / "tmp" / "stage.lock") as descriptor,
        guard.running(command, cwd=Path(root), env=environment, time_limit=JUDGE_SECONDS, hold=[descriptor]) as process,
    ):
        for line in process.stdout or ():
            output.append(line.rstrip())
            get_run_logger().info(line.rstrip())
    if process.returncode:
        refused_input = process.returncode == 2
        raise (RefusedError if refused_input else StageError)("judge: " + "\n".join(output))


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE)
def gate(root: str, version: str, champion: str | None) -> Decision:
    """Hold what was measured in `root` against the bounds of its params.yaml, and show the checks as a table."""
    with chdir(root):
        params = load_params("params.yaml")
        decision = decide(read_evidence(params, version, champion), params.promote, safety_words(params), params.seed)
    word = PASSED if decision.passed else REFUSED
    create_table_artifact(
        decision.as_rows(), key="gate", description=f"{params.promote.model_name} version {version}: {word}"
    )
    return decision


def read_evidence(params: Params, version: str, champion: str | None) -> Evidence:
    """What the current folder and the version's record say of it, and the folder of the champion."""
    from tasks.record import read_record
    from tasks.tracking import open_store

    challenger, beside, answers = read_rows(Path("reports/judge"))
    measured = read_json(Path("metrics/evaluate.json"))
    # of base, SFT and the policy, whose name is its algorithm's, only the last has moved away from SFT for a reward
    kl = [value for key, value in measured.items() if key.endswith(".kl") and key not in ("base.kl", "sft.kl")]
    client, _ = open_store(params.tracking.experiment)
    run_id = client.get_model_version(params.promote.model_name, version).tags.get("glmflow.run.pipeline")
    try:
        record = read_record(client, run_id) if run_id else {}
    except InputError:
        record = {}
    return Evidence(
        challenger,
        beside if champion else None,
        answers,
        reward_accuracy=measured.get("reward.accuracy"),
        kl=kl[0] if kl else None,
        repetition=read_json(Path("reports/judge/summary.json"))["challenger"].get("repetition"),
        latency=read_json(Path("reports/judge/summary.json"))["challenger"].get("latency"),
        uncommitted=record.get("uncommitted", []),
        faults=record.get("faults", ["no lineage was recorded"]),
    )


def safety_words(params: Params) -> list[str]:
    """The words of the list that params.yaml names."""
    return read_words(params.promote.safety_words)


def record_decision(
    client: "MlflowClient", root: Path, params: Params, verdict: Verdict, word: str, run_id: str | None
) -> None:
    """Keep the decision with the version, with its run, and in the checkout's reports."""
    name, version = params.promote.model_name, verdict.version
    tags = {
        "decision": word,
        "refused_by": "; ".join(check.name for check in verdict.decision.failed),
        "champion": verdict.champion or "",
        "checks": json.dumps(verdict.decision.as_rows(), ensure_ascii=False),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "flow_run": str(flow_run.id),
        "run": run_id or "",
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version, f"gate.{key}", value)
    if run_id:
        client.log_text(run_id, as_markdown(name, verdict, word), "promotion/decision.md")
        client.log_dict(run_id, tags | {"checks": verdict.decision.as_rows()}, "promotion/decision.json")
        client.log_artifacts(run_id, str(root / "reports" / "judge"), "promotion/judge")
    write_text(ROOT / "reports" / "promotion" / f"{name}-v{version}.md", as_markdown(name, verdict, word))


def as_markdown(name: str, verdict: Verdict, word: str) -> str:
    """The decision for a person."""
    against = f"champion: version {verdict.champion}" if verdict.champion else "no champion yet, so that floors count"
    rows = [
        [row["name"], row["value"], row["bound"], "yes" if row["passed"] else "NO"]
        for row in verdict.decision.as_rows()
    ]
    return f"# {name} version {verdict.version}: {word}\n\n({against})\n\n{table(COLUMNS, rows)}\n"


def waiting_for_approval(params: Params) -> tuple[str, str | None] | None:
    """The version that this flow run was suspended for, and the champion that it was compared with."""
    from tasks.tracking import open_store

    client, _ = open_store(params.tracking.experiment)
    this_run = f"name = '{params.promote.model_name}' AND tags.`gate.flow_run` = '{flow_run.id}'"
    found = client.search_model_versions(this_run)
    version = next((version for version in found if version.tags["gate.decision"] == AWAITING), None)
    return (str(version.version), version.tags["gate.champion"] or None) if version else None


def ask(params: Params, version: str, champion: str | None) -> State[Any]:
    """Suspend this run of a deployment until a person answers, then do as they say.

    The run's process ends here; a resumed run begins again, finds `waiting_for_approval`, and gets the answer from this
    call.
    """
    name = params.promote.model_name
    question = f"{name} version {version} passed the gate (see the artifact `gate`). Shall it be the champion?"
    answer = suspend_flow_run(
        wait_for_input=Approval.with_initial_data(description=question, approved=False),
        timeout=params.promote.approval_timeout,
        key="approval",
    )
    who = answer.by or "a person"
    if answer.approved:
        state = promoted(params, version, champion, f"passed the gate, approved: {answer.reason or 'yes'}", by=who)
    else:
        decided(params, version, REFUSED, f"{who}: {answer.reason or 'no'}")
        state = Completed(name="Refused", message=f"{name} version {version}: {who} said no: {answer.reason}")
    tell_run(params, version)
    return state


def promoted(params: Params, version: str, champion: str | None, reason: str, by: str) -> State[Any]:
    """Move the alias, unless somebody else has moved it since the comparison."""
    from flows.champion import CHAMPION, promote
    from flows.registry import alias_version
    from tasks.tracking import open_store

    name = params.promote.model_name
    now = alias_version(open_store(params.tracking.experiment)[0], name, CHAMPION)
    if now == version:  # by hand, or by another run at the same time
        decided(params, version, PASSED)
        return Completed(name="Unchanged", message=f"{name} version {version} is the champion already")
    if now != champion:
        why = f"the champion is version {now or 'none'} now, the comparison was with {champion or 'none'}"
        decided(params, version, REFUSED, why)
        return Completed(name="Refused", message=f"{name} version {version}: {why}; retrain --force compares again")
    promote(version, reason, params, by)
    decided(params, version, PASSED)  # until then, it waits
    message = f"{name} version {version} is the champion (before: {champion or 'none'})"
    return Completed(name="Promoted", message=message)


def refused(name: str, verdict: Verdict) -> State[Any]:
    """The state of a flow whose challenger did not pass: it did its work, so it is no failure."""
    why = "; ".join(f"{check.name}: {check.value}, must be {check.bound}" for check in verdict.decision.failed)
    return Completed(name="Refused", message=f"{name} version {verdict.version}: {why}")


def can_be_suspended() -> bool:
    """Only a deployment's run can: it is started again when a person has answered."""
    return deployment.id is not None


def decided(params: Params, version: str, word: str, refused_by: str = "") -> None:
    """Keep with the version what became of it."""
    from tasks.tracking import open_store

    client, _ = open_store(params.tracking.experiment)
    for key, value in {"decision": word, "refused_by": refused_by}.items():
        client.set_model_version_tag(params.promote.model_name, version, f"gate.{key}", value)


def tell_run(params: Params, version: str) -> None:
    """Keep with the run that a version was judged in what became of it: the next retraining tells it."""
    from tasks.tracking import open_store

    client, _ = open_store(params.tracking.experiment)
    tags = client.get_model_version(params.promote.model_name, version).tags
    if tags.get("gate.run"):
        client.set_tag(tags["gate.run"], "glmflow.gate", tags["gate.decision"])
