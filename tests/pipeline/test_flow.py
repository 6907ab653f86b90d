"""The flow and `dvc repro` are two ways to one result, and share every bit of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.dvc_stage import run_cache_key
from glm.config import load_params
from tasks import STEPS, programs
from tests.pipeline.conftest import Project, last_run, query

PROGRAMS = programs("ppo")
CACHED = dict.fromkeys(PROGRAMS, "Cached")
EXECUTED = dict.fromkeys(PROGRAMS, "Completed")


def test_flow_after_repro_executes_nothing(project: Project, prefect_api: str) -> None:
    project.dvc("repro")
    assert project.executed() == list(PROGRAMS)
    lock = (project.root / "dvc.lock").read_bytes()

    output = project.flow().stdout

    assert project.executed() == []
    assert (project.root / "dvc.lock").read_bytes() == lock
    run = last_run(prefect_api)
    assert run["state"]["type"] == "COMPLETED"
    assert run["tasks"] == CACHED | {"register": "Completed"}
    assert "5.000" in output and "3.100" in output  # the table
    assert "非常满意[bold]" in output
    assert "rlhf-policy version 1, alias challenger" in output

    # each stage's key is the name of its folder in DVC's run cache
    for step in STEPS:
        key = run_cache_key(step, project.root)
        assert key and (project.root / ".dvc" / "cache" / "runs" / key[:2] / key).is_dir()

    # a deleted output is no hit; it comes back from the cache
    shutil.rmtree(project.root / "models" / "sft")
    assert run_cache_key("sft", project.root) is None
    project.flow()
    assert project.executed() == []
    assert (project.root / "models" / "sft" / "made_with.json").exists()
    assert (project.root / "dvc.lock").read_bytes() == lock

    # a half-written one neither
    (project.root / "models" / "ppo" / "made_with.json").write_text("{")
    project.flow()
    assert project.executed() == []
    assert json.loads((project.root / "models" / "ppo" / "made_with.json").read_text())

    project.set_param("ppo.learning_rate", "5.0e-4", "2.0e-3")
    project.flow()
    assert project.executed() == ["ppo", "evaluate", "export"]
    assert last_run(prefect_api)["tasks"] == CACHED | dict.fromkeys(
        ["ppo", "evaluate", "export", "register"], "Completed"
    )
    assert "up to date" in project.dvc("repro")
    assert project.executed() == []

    # back again: DVC remembers
    project.set_param("ppo.learning_rate", "2.0e-3", "5.0e-4")
    project.flow()
    assert project.executed() == []
    assert (project.root / "dvc.lock").read_bytes() == lock


def test_repro_after_flow_executes_nothing(project: Project, prefect_api: str) -> None:
    project.flow()
    assert project.executed() == list(PROGRAMS)
    assert last_run(prefect_api)["tasks"] == EXECUTED | {"register": "Completed"}
    run = {"flow_runs": {"id": {"any_": [last_run(prefect_api)["id"]]}}}
    artifacts = {artifact["key"]: artifact["data"] for artifact in query(prefect_api, "artifacts/filter", run)}
    assert "| loss (held out) | 5.000 | 3.000 | 3.100 |" in artifacts["results"]
    assert artifacts["curves-ppo"].startswith("data:image/png;base64,")
    assert "/#/runs/" in artifacts["mlflow-pipeline"]

    lock = (project.root / "dvc.lock").read_bytes()
    assert "up to date" in project.dvc("repro")
    assert project.executed() == []
    (project.root / "dvc.lock").unlink()
    shutil.rmtree(project.root / ".dvc" / "cache")
    project.dvc("repro")
    assert (project.root / "dvc.lock").read_bytes() == lock


def test_a_failed_stage_fails_the_flow(project: Project, prefect_api: str) -> None:
    done = project.flow(check=False, FAIL_sft="3")
    assert done.returncode == 1
    assert "sft fell over" in done.stderr and "Traceback" not in done.stderr
    assert project.executed() == ["fetch", "preprocess", "base", "sft"]
    run = last_run(prefect_api)
    assert run["state"]["type"] == "FAILED"
    assert run["tasks"] == {"fetch": "Completed", "preprocess": "Completed", "base": "Completed", "sft": "Failed"}
    assert "models/sft" not in (project.root / "dvc.lock").read_text()
    assert mlflow_status(project.root) == "FAILED"

    project.flow()
    assert project.executed() == ["sft", "evaluate_sft", "reward", "reward_judge", "ppo", "evaluate", "export"]
    assert mlflow_status(project.root) == "FINISHED"


def test_network_stages_are_tried_again_unless_the_input_is_refused(project: Project, prefect_api: str) -> None:
    assert project.flow(check=False, FAIL_fetch="1").returncode == 1
    assert project.executed() == ["fetch"] * 3
    refused = project.flow(check=False, FAIL_fetch="2")
    assert refused.returncode == 2
    assert refused.stderr == "this is fetch\nfetch fell over\n"
    assert project.executed() == ["fetch"]


def test_without_a_server_the_flow_brings_its_own(project: Project) -> None:
    del project.env["PREFECT_API_URL"]
    done = project.flow()
    assert project.executed() == list(PROGRAMS)
    assert "Before and after" in done.stdout
    assert done.stderr == ""  # quiet
    project.assert_nothing_runs()
    assert not Path(project.env["HOME"], ".prefect").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-S", "ppo.learning_rat=2e-5"], "did you mean ppo.learning_rate?"),
        (["-S", "ppo.learning_rate=fast"], "ppo.learning_rate"),
        (["-S", "ppo.batch_size=33"], "not a multiple of mini_batch_size"),
        (["-S", "ppo.learning_rate"], "expected NAME=VALUE"),
    ],
)
def test_wrong_overrides_are_refused(project: Project, arguments: list[str], message: str) -> None:
    refused(project, arguments, message)


def test_wrong_params_are_refused(project: Project) -> None:
    project.set_param("sft.lora_rank", "16", "sixteen")
    refused(project, [], "sft.lora_rank")


def test_overrides_need_committed_code(project: Project) -> None:
    (project.root / "glm" / "new.py").write_text("")
    refused(project, ["-S", "ppo.learning_rate=2e-5"], "glm/new.py")


def refused(project: Project, arguments: list[str], message: str) -> None:
    """Exit status 2, the message and nothing else, nothing written."""
    status = project.git("status", "--porcelain", "--ignored")
    done = project.flow(*arguments, check=False)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    written = set(project.git("status", "--porcelain", "--ignored").splitlines()) - set(status.splitlines())
    assert all("__pycache__" in line for line in written), written


def test_overrides_run_in_a_workspace(project: Project) -> None:
    project.flow()
    project.executed()
    project.commit()

    output = project.flow("-S", "ppo.learning_rate=2e-5").stdout

    assert project.executed() == ["ppo", "evaluate", "export"]
    assert project.git("status", "--porcelain") == ""
    assert len(project.git("worktree", "list").splitlines()) == 1
    assert list((project.root / ".worktrees").iterdir()) == []
    (name,) = project.dvc("exp", "list", "--name-only").split()
    assert f"dvc exp apply {name}" in output

    output = project.flow("-S", "sft.lora_rank=8", "--until", "sft").stdout  # later steps' results are an earlier run's
    run = next(line.split()[2] for line in output.splitlines() if line.strip().startswith("glmflow export"))
    [folder] = (project.root / "mlruns").rglob(f"{run}/artifacts/lineage")
    assert {path.stem for path in (folder / "metrics").iterdir()} == {"preprocess", "base", "sft"}
    record = json.loads((folder / "record.json").read_text())
    assert list(record["runs"])[-1] == "sft" and record["export"] is None and record["faults"] == []
    assert "before and after" not in output.lower() and "evaluate" not in (folder / "dvc.lock").read_text()
    assert project.executed() == ["sft"]

    project.dvc("exp", "apply", name)
    assert load_params(project.root / "params.yaml").ppo.learning_rate == 2e-5
    assert "# Every knob of a run" in (project.root / "params.yaml").read_text()
    assert json.loads((project.root / "models" / "ppo" / "made_with.json").read_text())["ppo.learning_rate"] == 2e-5
    assert "up to date" in project.dvc("repro")
    assert project.executed() == []


def test_each_algorithm_has_its_own_results(project: Project, prefect_api: str) -> None:
    project.flow()
    assert project.executed() == list(PROGRAMS)
    lock = (project.root / "dvc.lock").read_bytes()
    params = (project.root / "params.yaml").read_text()
    (project.root / "params.yaml").write_text(params.replace("\nalgorithm: ppo", "\nalgorithm: dpo", 1))

    output = project.flow().stdout

    assert project.executed() == ["dpo", "evaluate", "export"]
    assert last_run(prefect_api)["tasks"]["dpo"] == "Completed" and "DPO" in output
    assert json.loads((project.root / "models" / "dpo" / "made_with.json").read_text())["dpo.beta"] == 0.1
    assert (project.root / "metrics" / "dpo.json").exists()
    assert "up to date" in project.dvc("repro")
    # PPO's code and knobs are no business of DPO's
    with (project.root / "glm" / "training" / "ppo.py").open("a") as file:
        file.write("\n# changed\n")
    project.set_param("ppo.learning_rate", "5.0e-4", "2.0e-3")
    project.dvc("repro")
    assert project.executed() == []
    project.git("checkout", "--quiet", "glm", "params.yaml")
    project.flow()
    assert project.executed() == []
    assert (project.root / "dvc.lock").read_bytes() == lock


def test_two_flows_at_once_execute_each_stage_once(project: Project) -> None:
    flows = [project.start_flow(SLEEP_sft="2"), project.start_flow("-S", "seed=42", SLEEP_sft="2")]
    for flow in flows:
        _, errors = flow.communicate(timeout=600)
        assert flow.returncode == 0, errors
    assert sorted(project.executed()) == sorted(PROGRAMS)


def mlflow_status(root: Path) -> str:
    """The status of the newest pipeline run in the project's store."""
    query = (
        "import mlflow, sys; runs = mlflow.search_runs(search_all_experiments=True, output_format='list',"
        " filter_string=\"tags.`glmflow.step` = 'pipeline'\"); print(runs[0].info.status)"
    )
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlruns/mlflow.db"}
    return subprocess.run([sys.executable, "-c", query], env=env, capture_output=True, text=True).stdout.strip()
