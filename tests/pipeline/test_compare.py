"""`glmflow compare`: one table of variants and seeds, whatever stops it in between; DVC, MLflow and Prefect agree."""

import csv
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.pipeline.conftest import Project, last_run, query

RANKS = ["-S", "sft.lora_rank=4,8", "--seeds", "1,2", "--name", "ranks"]
SHARED = ["fetch", "preprocess", "base"]
CELL = ["sft", "evaluate_sft"]


def compare(project: Project, *words: str, check: bool = True, **env: str) -> str:
    """Run `glmflow compare`; its output, errors included."""
    done = project.command(sys.executable, "-m", "apps.cli", "compare", *words, check=check, **env)
    return f"{done.stdout}{done.stderr}\nexit status {done.returncode}"


def lines(project: Project, name: str, file: str = "cells.csv") -> list[dict[str, str]]:
    with (project.root / "reports" / "compare" / name / file).open(encoding="utf-8") as text:
        return list(csv.DictReader(text))


def mlflow_runs(project: Project) -> tuple[Run, dict[str, Run]]:
    """The run of the one comparison, and the runs right below it by name."""
    client = MlflowClient(f"sqlite:///{project.root}/mlruns/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(ids, "tags.`glmflow.step` = 'compare'")
    children = client.search_runs(ids, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return parent, {run.info.run_name: run for run in children}


def test_killed_it_goes_on_and_ends_in_one_table(project: Project, prefect_api: str) -> None:
    project.set_param("tracking.system_metrics", "true", "false")
    project.commit()
    flow = project.start_flow(*RANKS, module="flows.compare_methods", SLEEP_evaluate_sft="60")
    project.wait_for("evaluate_sft")
    flow.kill()
    flow.communicate()
    project.assert_nothing_runs()
    assert project.executed() == [*SHARED, *CELL]

    output = compare(project, *RANKS, FAIL_sft_8="3", check=False)

    assert project.executed() == ["evaluate_sft", "sft", *CELL, "sft"]  # the first sft is restored; rank 8 falls over
    assert "exit status 1" in output and "ranks-lora_rank=8-seed2 failed: sft fell over" in output
    four, eight = lines(project, "ranks", "table.csv")[1:]
    assert (four["variant"], four["seeds"], four["failed"]) == ("lora_rank=4", "2", "0")
    assert (eight["seeds"], eight["failed"]) == ("0", "2")
    assert last_run(prefect_api, "compare-methods")["state"]["type"] == "FAILED"

    output = compare(project, *RANKS)

    assert project.executed() == CELL * 2  # what had failed
    base, four, eight = lines(project, "ranks", "table.csv")
    assert float(base["loss"]) == 5.0
    assert float(four["loss"]) == pytest.approx(3 - 0.12 - 4.05) and float(four["loss_std"]) == pytest.approx(
        0.1 / 2**0.5
    )
    assert float(eight["loss"]) - float(four["loss"]) == pytest.approx(0.04)
    folder = project.root / "reports" / "compare" / "ranks"
    assert {path.name for path in folder.iterdir()} == {"table.md", "table.csv", "cells.csv", "plot.png"}
    assert "| lora_rank=4 | -1.170 ± 0.071 |" in (folder / "table.md").read_text(encoding="utf-8")

    # the same cells by the same names in DVC, MLflow and the table
    cells = lines(project, "ranks")
    names = {cell["experiment"] for cell in cells}
    assert names == {f"ranks-lora_rank={rank}-seed{seed}" for rank in (4, 8) for seed in (1, 2)}
    assert set(project.dvc("exp", "list", "--name-only").split()) == names
    parent, children = mlflow_runs(project)
    assert {run.info.run_id: name for name, run in children.items()} == {
        cell["mlflow_run_id"]: cell["experiment"] for cell in cells
    }
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    for name, run in children.items():
        assert run.data.tags["glmflow.dvc_exp_name"] == name
        assert run.data.metrics["loss"] == float(next(cell["loss"] for cell in cells if cell["experiment"] == name))
    assert "| lora_rank=4 |" in parent.data.tags["mlflow.note.content"]
    assert all(run.info.run_id in output for run in children.values())  # the link
    flow_run = last_run(prefect_api, "compare-methods")
    assert flow_run["state"]["type"] == "COMPLETED"
    artifacts = query(prefect_api, "artifacts/filter", {"flow_runs": {"id": {"any_": [flow_run["id"]]}}})
    assert {"comparison", "comparison-cells", "mlflow-comparison"} <= {artifact["key"] for artifact in artifacts}
    assert project.git("status", "--porcelain") == ""
    assert len(project.git("worktree", "list").splitlines()) == 1


def test_queued_experiments_end_in_the_same_table(project: Project) -> None:
    project.commit()
    project.dvc("exp", "run", "--queue", "-S", "sft.lora_rank=4,8", "evaluate_sft")
    project.dvc("exp", "run", "--run-all")
    assert project.executed() == [*SHARED, *CELL * 2]

    output = compare(project, "--experiments", "all", "--name", "queued")

    assert "exit status 0" in output
    cells = lines(project, "queued")
    assert [cell["variant"] for cell in cells] == ["lora_rank=4", "lora_rank=8"] or len(cells) == 2
    assert {cell["experiment"] for cell in cells} == set(project.dvc("exp", "list", "--name-only").split())
    assert sorted(float(cell["loss"]) for cell in cells) == pytest.approx([2.88, 2.92])
    assert project.executed() == []

    # and the other way round: what DVC's queue has made costs a comparison nothing
    compare(project, "-S", "sft.lora_rank=4,8")
    assert project.executed() == []


def test_algorithms_are_compared_by_what_each_of_them_trained(project: Project) -> None:
    project.commit()

    output = compare(project, "--algorithms", "ppo,dpo")

    assert "exit status 0" in output
    shared = [*SHARED, *CELL, "reward", "reward_judge"]
    assert project.executed() == [*shared, "ppo", "evaluate", "dpo", "evaluate"]
    cells = {cell["variant"]: cell for cell in lines(project, "algorithms")}
    assert {name: float(cell["kl"]) for name, cell in cells.items()} == {"ppo": 6.0, "dpo": 6.0}


def test_a_wrong_comparison_runs_nothing(project: Project) -> None:
    output = compare(project, "-S", "sft.lora_rnk=4,8", check=False)
    assert "exit status 2" in output and "did you mean sft.lora_rank?" in output and "Traceback" not in output
    output = compare(project, "--algorithms", "ppo,qpo", check=False)
    assert "exit status 2" in output and "variant 'qpo'" in output and "'qpo'" in output and "Traceback" not in output
    assert project.executed() == [] and not Path(project.root, "mlruns").exists()
