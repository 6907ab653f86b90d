"""The real steps with parameters that take seconds: by the flow, told by the store, and made again by `dvc repro`."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.workspace import write_overrides
from tasks import programs
from tests.pipeline.conftest import Project, copy_checkout, last_run

GLMFLOW = [sys.executable, "-m", "apps.cli"]
CHAMPION = "models:/rlhf-policy@champion"
TINY = {
    "model.embedded.vocab_size": 2000,
    "model.embedded.hidden_size": 64,
    "model.embedded.num_layers": 2,
    "model.embedded.num_train_epochs": 1,
    "data.max_samples": 200,
    "data.reward": ["reviews_pairs", "feedback"],
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


def test_the_flow_makes_a_champion_that_tells_its_lineage_and_is_made_again(tmp_path: Path, prefect_api: str) -> None:
    root, home = tmp_path / "project", tmp_path / "home"
    home.mkdir()
    copy_checkout(root)
    write_overrides(root / "params.yaml", TINY)
    feedback = root / "data" / "feedback" / "monday.jsonl"
    feedback.write_text(
        json.dumps({"prompt": [{"role": "user", "content": "写评论"}], "chosen": "好", "rejected": "坏"}) + "\n"
    )
    project = Project(root, home, prefect_api)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    note = root / "glm" / "errors.py"
    committed = note.read_text()
    note.write_text(f"{committed}\n# not committed\n")

    output = project.flow().stdout
    assert last_run(prefect_api)["tasks"] == dict.fromkeys([*programs("ppo"), "register"], "Completed")
    assert "rlhf-policy version 1, alias challenger" in output
    assert (root / "models" / "export" / "model.safetensors").exists()
    metrics = json.loads((root / "metrics" / "evaluate.json").read_text())
    for who in ("base", "sft", "ppo"):
        assert f"{metrics[f'{who}.loss']:.3f}" in output
    assert "up to date" in project.dvc("repro")
    project.command(*GLMFLOW, "promote", "challenger", "--reason", "to see where it came from")
    made = locked(root)

    # the folder moves on; only git, DVC's remote and the store are left
    project.dvc("remote", "add", "--local", "--default", "elsewhere", str(tmp_path / "remote"))
    project.dvc("push")
    note.write_text(committed)
    feedback.unlink()
    for folder in ("models", "prepared", "metrics", "reports", "runs", ".cache", ".dvc/cache"):
        shutil.rmtree(root / folder)
    (root / "dvc.lock").unlink()
    shown = project.command(
        *GLMFLOW, "lineage", CHAMPION, "--json", str(tmp_path / "l.json"), "--graph", str(tmp_path / "l.png")
    ).stdout
    assert "uncommitted changes in glm/errors.py" in shown
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "l.json").read_text())
    nodes = {node["name"]: node for node in found["nodes"]}
    assert nodes["feedback"]["facts"]["rows"]["reward"]["read"] == 1
    assert nodes["models/export"]["hash"] == made["models/export"]
    assert "models/reward" in nodes["models/ppo"]["made_from"]
    assert "reward: reward/train tokenised" in nodes["models/reward"]["made_from"]
    assert nodes["models/sft"]["facts"]["metrics"]["eval_loss"] > 0
    assert nodes["models/sft"]["facts"]["machine"]["machine.threads"] == "1"
    assert found["facts"]["commit"] == project.git("rev-parse", "HEAD").strip()

    # an export is described from the store too
    project.command(*GLMFLOW, "export", CHAMPION, str(tmp_path / "int4"), "--quantization", "cpm-int4")
    card = (tmp_path / "int4" / "README.md").read_text()
    assert "| feedback | reward | 1 |" in card and nodes["feedback"]["hash"] in card
    assert f"| commit | {found['facts']['commit']} |" in card and "| not committed | glm/errors.py |" in card
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_bit"] == 4

    again = project.command(*GLMFLOW, "reproduce", CHAMPION).stdout  # by `dvc repro`, in a clone without any cache
    assert "outputs are equal, bit by bit" in again
    assert "recorded uncommitted changes in glm/errors.py" in again
    assert project.git("status", "--porcelain") == ""
    assert not list((root / ".worktrees").iterdir())


@pytest.mark.slow
def test_a_pipeline_goes_on_with_an_earlier_adapter(tmp_path: Path) -> None:
    root, home = tmp_path / "project", tmp_path / "home"
    home.mkdir()
    copy_checkout(root)
    start = {"data.reward": ["reviews_pairs"], "sft.learning_rate": 0.02, "sft.warmup_steps": 0}
    write_overrides(root / "params.yaml", TINY | start)
    project = Project(root, home, None)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    project.dvc("repro", "sft")
    alone = json.loads((root / "metrics" / "sft.json").read_text())
    shutil.copytree(root / "models" / "sft", root / "earlier")
    barely = {"model.adapters": ["earlier"], "sft.learning_rate": 1e-9}  # SFT stays what it starts from
    write_overrides(root / "params.yaml", barely)
    project.dvc("repro", "evaluate", "export")
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
