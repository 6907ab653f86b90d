"""MLflow runs of stages that DVC, a flow or a person starts: real git, DVC and sqlite in a project of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from glm.config import load_params
from tasks.lineage import hashes_in_lock
from tasks.tracking import finish_parent_run, link_steps, main_checkout, start_parent_run

ROOT = Path(__file__).parent.parent.parent

PIPELINE = """
stages:
  base:
    cmd: python base.py
    deps: [base.py]
    params: [seed]
    outs: [models/base, runs/base.json]
    metrics: [metrics/base.json]
  sft:
    cmd: python sft.py
    deps: [sft.py, models/base]
    params: [seed, sft]
    outs: [models/sft, runs/sft.json]
    metrics: [metrics/sft.json]
    plots: [plots/sft.csv]
"""

STAGE = """
import time

from glm.files import write_text
from tasks.stage import main

def run(stage):
    for step in (1, 2):
        stage.log(step, {"loss": 2.0 / step})
    time.sleep(0.002)  # the store keeps equal points of one millisecond once, and the result equals the last of these
    write_text("models/STEP/weights", f"{stage.params.seed} {stage.params.sft.learning_rate}")
    return {"loss": 1.0}

if __name__ == "__main__":
    main("STEP", run, uses_torch=False)
"""


def call(folder: Path, *command: str, **more: str) -> str:
    """Run a command in the project as a user would, with the store where it is by default."""
    result = subprocess.run(command, cwd=folder, env=environment() | more, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def environment() -> dict[str, str]:
    """A user's, who has set nothing."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GLMFLOW_", "MLFLOW_", "DVC_", "GIT_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without experiments: making the tables takes longer than a stage."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def project(tmp_path: Path, tables: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "mlruns").mkdir(parents=True)
    shutil.copy(tables, folder / "mlruns")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "requirements.lock").write_text("mlflow==3.17.2\n")
    (folder / ".gitignore").write_text("/models/\n/runs/\n/metrics/\n/plots/\n/mlruns/\n")
    for step in ("base", "sft"):
        (folder / f"{step}.py").write_text(STAGE.replace("STEP", step))
    call(folder, "git", "init", "-q")
    call(folder, "dvc", "init", "-q")
    call(folder, "git", "add", ".")
    call(folder, "git", "commit", "-qm", "start")
    return folder


def runs(folder: Path) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("rlhf-pipeline")
    assert experiment.artifact_location == str(folder / "mlruns/artifacts")
    return client, client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def test_stages_of_one_dvc_repro_share_a_parent(project: Path) -> None:
    call(project, "dvc", "repro")
    client, (parent, base, sft) = runs(project)
    assert [run.info.run_name for run in (parent, base, sft)] == ["dvc repro", "base", "sft"]
    assert {run.info.status for run in (parent, base, sft)} == {"FINISHED"}
    assert base.data.tags["mlflow.parentRunId"] == sft.data.tags["mlflow.parentRunId"] == parent.info.run_id

    assert parent.data.tags["glmflow.run.base"] == base.info.run_id
    assert parent.data.tags["glmflow.run.sft"] == sft.info.run_id
    assert parent.data.metrics == {"base.loss": 1.0, "sft.loss": 1.0}
    assert parent.data.params["ppo.kl_coef"] == str(load_params(project / "params.yaml").ppo.kl_coef)
    assert parent.data.tags["mlflow.note.content"].startswith("One run of the RLHF pipeline on `embedded`")
    kept = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert kept == {"params.yaml", "requirements.lock"}

    commit = call(project, "git", "rev-parse", "HEAD").strip()
    assert sft.data.tags["mlflow.source.git.commit"] == commit
    assert sft.data.tags["glmflow.git_dirty"] == "false"
    lock = hashes_in_lock(project / "dvc.lock")
    assert sft.data.tags["dvc.in.models/base"] == base.data.tags["dvc.out.models/base"] == lock["models/base"]
    assert sft.data.tags["dvc.out.models/sft"] == lock["models/sft"]

    call(project, "dvc", "repro", "-f", "-s", "sft")  # another dvc process: another parent, which names the old base
    _, (*_, parent, new_sft) = runs(project)
    assert new_sft.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["glmflow.run.base"] == base.info.run_id
    assert parent.data.tags["glmflow.run.sft"] == new_sft.info.run_id


def test_a_failed_stage_fails_the_parent(project: Path) -> None:
    (project / "sft.py").write_text((project / "sft.py").read_text().replace("2.0 / step", "2.0 / 0"))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        call(project, "dvc", "repro")
    _, (parent, base, sft) = runs(project)
    assert [run.info.status for run in (parent, base, sft)] == ["FAILED", "FINISHED", "FAILED"]
    assert sft.data.tags["glmflow.git_dirty"] == "true"
    assert parent.data.metrics == {"base.loss": 1.0}


def test_a_flow_s_run_links_restored_steps_to_the_runs_that_made_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    params = load_params()
    first = start_parent_run(params, "first")
    call(project, "dvc", "repro", GLMFLOW_PARENT_RUN_ID=str(first))
    finish_parent_run(first, "FINISHED", ["base", "sft"])
    made = {step: json.loads(Path("runs", f"{step}.json").read_text())["run_id"] for step in ("base", "sft")}

    for path in ("models/sft/weights", "runs/sft.json", "metrics/sft.json"):
        Path(path).unlink()
    second = start_parent_run(params, "second", tags={"prefect.flow_run": "brave-otter"})
    call(project, "dvc", "repro", GLMFLOW_PARENT_RUN_ID=str(second))
    Path("table.md").write_text("| loss |")
    finish_parent_run(second, "FINISHED", ["base", "sft"], artifacts=["table.md"])

    client, all_runs = runs(project)
    assert len(all_runs) == 4  # two parents; base and sft ran once
    for step in ("base", "sft"):
        assert client.get_run(made[step]).data.tags["mlflow.parentRunId"] == first
    parent = client.get_run(str(second))
    assert {step: parent.data.tags[f"glmflow.run.{step}"] for step in made} == made
    assert parent.data.metrics == {"base.loss": 1.0, "sft.loss": 1.0}
    assert parent.data.tags["prefect.flow_run"] == "brave-otter"
    assert parent.info.status == "FINISHED"
    kept = {artifact.path for artifact in client.list_artifacts(str(second))}
    assert kept == {"params.yaml", "requirements.lock", "dvc.lock", "table.md"}


def test_a_step_is_linked_once(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(f"sqlite:///{tables}")
    parent = client.create_run("0").info.run_id
    for folder, text in (("metrics", '{"loss": 1.0, "text": {"rows": 2}}'), ("runs", '{"run_id": "abc"}')):
        Path(folder).mkdir()
        for step in ("preprocess", "sft") if folder == "metrics" else ("sft",):
            Path(folder, f"{step}.json").write_text(text)
    for _ in range(2):
        link_steps(client, parent, ["fetch", "preprocess", "sft"])
    found = client.get_run(parent).data
    assert {key: value for key, value in found.tags.items() if key.startswith("glmflow")} == {"glmflow.run.sft": "abc"}
    assert set(found.metrics) == {"preprocess.loss", "preprocess.text.rows", "sft.loss", "sft.text.rows"}
    assert {len(client.get_metric_history(parent, name)) for name in found.metrics} == {1}


def test_the_store_is_the_main_checkout_s_from_worktrees_and_experiments(project: Path) -> None:
    call(project, "git", "worktree", "add", "-q", "../tree")
    tree = project.parent / "tree"
    (tree / "params.yaml").write_text((tree / "params.yaml").read_text(encoding="utf-8").replace("seed: 42", "seed: 1"))
    call(tree, "dvc", "repro", "base")
    assert not (tree / "mlruns").exists()
    _, (_, base) = runs(project)
    assert base.data.params["seed"] == "1"
    assert base.data.tags["glmflow.git_dirty"] == "false"  # params.yaml is recorded, not counted

    call(project, "dvc", "exp", "run", "--temp", "-q", "-n", "quick", "-S", "seed=2", "base")
    _, (_, _, parent, base) = runs(project)
    assert (parent.info.run_name, base.info.run_name) == ("quick", "base")
    assert base.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert base.data.tags["glmflow.dvc_exp_name"] == "quick"
    assert base.data.params["seed"] == "2"


def test_without_git_the_store_is_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert main_checkout() == tmp_path


def test_four_first_users_at_once(tmp_path: Path) -> None:
    code = "from tasks.tracking import open_store; print(open_store('rlhf-pipeline')[1])"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/new/mlflow.db", "OMP_NUM_THREADS": "1"}
    users = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = {user.communicate()[0] for user in users}
    assert [user.returncode for user in users] == [0, 0, 0, 0]
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("http://me:secret@127.0.0.1:9", "MLflow at http://127.0.0.1:9: "),
        (
            "postgresql://me:secret@127.0.0.1:9/db",
            "MLflow at postgresql://127.0.0.1:9/db: the store cannot be opened: ",
        ),
        ("http://[bad", "MLflow at http://[bad: the store cannot be opened: Invalid IPv6 URL"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_line_for_who_asks_it(uri: str, line: str) -> None:
    command = [sys.executable, "-m", "apps.cli", "champions"]
    there = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment() | there, capture_output=True, text=True)
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_a_dead_server_does_not_stop_the_stage(project: Path) -> None:
    started = time.monotonic()
    said = call(project, "python", "sft.py", MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9")
    assert time.monotonic() - started < 60
    assert said.count("the step goes on") == 1
    assert "glmflow sync" in said
    assert "secret" not in said
    assert json.loads((project / "metrics/sft.json").read_text()) == {"loss": 1.0}
    assert json.loads((project / "runs/sft.json").read_text())["run_id"] is None

    # the next run that reaches a store sends what was kept
    call(project, "python", "base.py")
    client, all_runs = runs(project)
    (sft,) = (run for run in all_runs if run.info.run_name == "sft")
    assert sft.info.status == "FINISHED"
    assert [point.value for point in client.get_metric_history(sft.info.run_id, "loss")] == [2.0, 1.0, 1.0]
    assert sft.data.params["sft.lora_rank"] == "16"
    assert "dvc.out.models/sft" in sft.data.tags
    assert list((project / "mlruns" / "unsent").iterdir()) == []


@pytest.mark.parametrize("store", ["there", "away"])
def test_kill_9_leaves_no_running_run_and_loses_no_point(project: Path, store: str) -> None:
    text = (project / "sft.py").read_text()
    slow = text.replace(
        "    write_text", "    print('up', flush=True)\n    __import__('time').sleep(60)\n    write_text"
    )
    (project / "slow.py").write_text(slow)
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"} if store == "away" else {}
    out = subprocess.PIPE
    process = subprocess.Popen(["python", "slow.py"], cwd=project, env=environment() | away, stdout=out, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    call(project, "python", "base.py")
    client, all_runs = runs(project)
    (sft,) = (run for run in all_runs if run.info.run_name == "sft")
    assert sft.info.status == "KILLED"
    assert client.get_metric_history(sft.info.run_id, "loss")[0].value == 2.0


def test_a_store_that_comes_back_gets_everything(project: Path) -> None:
    body = 'write_text("models/STEP'.replace("STEP", "sft")
    mended = f'__import__("os").unlink("{project.parent}/store")\n    {body}'
    (project / "sft.py").write_text((project / "sft.py").read_text().replace(body, mended))
    (project.parent / "store").write_text("a file where the store's folder should be")
    uri = f"sqlite:///{project.parent}/store/mlflow.db"
    said = call(project, "python", "sft.py", MLFLOW_TRACKING_URI=uri)
    assert said.count("warning") == 1
    client = MlflowClient(uri)
    run = client.get_run(json.loads((project / "runs/sft.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "loss")[:2]] == [2.0, 1.0]
    assert run.data.params["sft.lora_rank"] == "16"
    assert "dvc.out.models/sft" in run.data.tags
