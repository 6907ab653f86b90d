"""The real steps with parameters that take seconds, by the flow and by `dvc repro`: the same result."""

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.workspace import write_overrides
from tasks import programs
from tests.pipeline.conftest import Project, copy_checkout, last_run

TINY = {
    "model.embedded.vocab_size": 2000,
    "model.embedded.hidden_size": 64,
    "model.embedded.num_layers": 2,
    "model.embedded.num_train_epochs": 1,
    "data.max_samples": 200,
    "sft.max_steps": 3,
    "sft.eval_steps": 3,
    "sft.logging_steps": 1,
    "reward.max_steps": 3,
    "reward.eval_steps": 3,
    "reward.logging_steps": 1,
    "ppo.max_steps": 2,
    "ppo.eval_steps": 1,
    "ppo.minimum_reward_accuracy": 0.0,
    "evaluate.max_samples": 8,
    "evaluate.max_new_tokens": 8,
}


@pytest.fixture
def real_project(tmp_path: Path, prefect_api: str) -> Project:
    """The checkout as it is, with tiny parameters."""
    root, home = tmp_path / "project", tmp_path / "home"
    home.mkdir()
    copy_checkout(root)
    write_overrides(root / "params.yaml", TINY)
    project = Project(root, home, prefect_api)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    return project


def test_flow_and_repro_make_the_same(real_project: Project, tmp_path: Path, prefect_api: str) -> None:
    project = real_project
    output = project.flow().stdout
    assert last_run(prefect_api)["tasks"] == dict.fromkeys([*programs("ppo"), "register"], "Completed")
    assert "rlhf-policy version 1, alias challenger" in output
    assert (project.root / "models" / "export" / "model.safetensors").exists()
    metrics = json.loads((project.root / "metrics" / "evaluate.json").read_text())
    for who in ("base", "sft", "ppo"):
        assert f"{metrics[f'{who}.loss']:.3f}" in output
    assert "up to date" in project.dvc("repro")

    clone = Project(tmp_path / "clone", Path(project.env["HOME"]), None)
    project.git("clone", "--quiet", ".", str(clone.root))
    clone.dvc("repro")
    assert locked(clone.root) == locked(project.root)


@pytest.mark.slow
def test_a_pipeline_goes_on_with_an_earlier_adapter(real_project: Project) -> None:
    root = real_project.root
    write_overrides(root / "params.yaml", {"sft.learning_rate": 0.02, "sft.warmup_steps": 0})
    real_project.dvc("repro", "sft")
    alone = json.loads((root / "metrics" / "sft.json").read_text())
    shutil.copytree(root / "models" / "sft", root / "earlier")
    barely = {"model.adapters": ["earlier"], "sft.learning_rate": 1e-9}  # SFT stays what it starts from
    write_overrides(root / "params.yaml", barely)
    real_project.dvc("repro", "evaluate", "export")
    assert json.loads((root / "metrics" / "sft.json").read_text())["eval_loss"] == pytest.approx(alone["eval_loss"])
    metrics = json.loads((root / "metrics" / "evaluate.json").read_text())
    assert alone["eval_loss"] < alone["eval_loss_before"] - 0.02
    for name in ("loss", "reward", "judge"):  # so "base" means the base under the earlier adapter
        assert metrics[f"base.{name}"] == pytest.approx(metrics[f"sft.{name}"], abs=1e-4)
    assert metrics["base.kl"] == pytest.approx(0, abs=1e-4)


def locked(root: Path) -> dict[str, str]:
    """Every output's hash in dvc.lock, but for the records of who made it when, which differ by nature."""
    stages = YAML(typ="safe", pure=True).load((root / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
    return {path: md5 for path, md5 in outs.items() if not path.startswith("runs/")}
