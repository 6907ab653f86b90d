"""Each recipe runs to its end on a tiny model of its family and rows of the real files' formats."""

import json
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from flows.recipes import read_recipe
from glm.config import load_params
from glm.data.cache import tokenize
from glm.data.prepare import prepare
from glm.data.sources import fetch
from glm.files import read_jsonl
from glm.models import load_model, load_tokenizer
from glm.training import sft
from tests.pipeline.conftest import ROOT, Project, copy_checkout
from tests.pipeline.recipe_data import put_stand_ins

WHO = {"data.placeholders.NAME": "小智", "data.placeholders.AUTHOR": "某某实验室"}
# A tiny model of the family, and trainings of a few steps; all else is the recipe's.
TINY = {
    "model.dtype": "float32",
    "launch.num_processes": 1,
    "data.test_ratio": 0.2,
    "data.dev_ratio": 0.1,
    "sft.max_steps": 3,
    "sft.logging_steps": 1,
    "reward.max_steps": 2,
    "ppo.max_steps": 1,
    "ppo.max_new_tokens": 8,
    "ppo.minimum_reward_accuracy": 0.0,
    "evaluate.max_samples": 4,
    "evaluate.max_new_tokens": 8,
}
MODELS = {
    "ads_generation": "chatglm1-e2e",
    "alter_self_cognition_chatglm": "chatglm1-e2e",
    "alter_self_cognition_chatglm2": "chatglm2-e2e",
    "covid_doctor": "chatglm1-e2e",
    "full_tuning": "chatglm2-e2e",
    "qlora_small_gpu": "chatglm2-e2e",
}


def settings(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in ("-S", f"{name}={value}")]


@pytest.fixture
def stand_ins(tmp_path: Path, prefect_api: str) -> Project:
    """The checkout with stand-ins for the data that would be downloaded."""
    root, home = tmp_path / "project", tmp_path / "home"
    home.mkdir()
    copy_checkout(root)
    put_stand_ins(root / "data")
    project = Project(root, home, prefect_api)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    return project


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_runs_to_its_end(name: str, stand_ins: Project) -> None:
    project, model = stand_ins, ROOT / "tests" / "golden" / MODELS[name]
    more = {"model.path": model} | ({"launch.num_processes": 2} if name == "full_tuning" else {})
    output = project.flow(f"recipes/{name}.yaml", *settings(TINY | WHO | more)).stdout
    experiment = next(line.split()[3] for line in output.splitlines() if line.strip().startswith("dvc exp apply"))
    end = read_recipe(ROOT / "recipes" / f"{name}.yaml").until or "evaluate"
    project.command("dvc", "exp", "apply", experiment, check=end == "evaluate")  # complains of steps that did not run
    metrics = json.loads((project.root / "metrics" / f"{end}.json").read_text())
    assert metrics["base.loss"] > 0 and metrics["sft.loss"] != metrics["base.loss"]
    assert ("rlhf-policy version 1" in output) == (end == "evaluate") == (project.root / "models" / "export").exists()
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml").overrides
    if recipe["sft.method"] == "lora":
        adapter = json.loads((project.root / "models" / "sft" / "adapter_config.json").read_text())
        assert adapter["r"] == recipe["sft.lora_rank"]
    if end == "evaluate_sft" and recipe["sft.method"] == "lora":  # the result by the run's id
        run = next(line.split()[2] for line in output.splitlines() if line.strip().startswith("glmflow export"))
        project.command(sys.executable, "-m", "apps.cli", "export", run, "out", "--what", "adapter")
        assert "| identity | sft | 80 | 80 |" in (project.root / "out" / "README.md").read_text() or "alter" not in name
    if name.startswith("alter"):
        rows = (project.root / "prepared" / "rows" / "sft" / "train.jsonl").read_text()
        assert "小智" in rows and "<NAME>" not in rows


@pytest.mark.slow
def test_the_comparison_of_methods_runs_to_its_end(stand_ins: Project) -> None:
    project, model = stand_ins, ROOT / "tests" / "golden" / "chatglm1-e2e"
    tiny = {name: value for name, value in TINY.items() if not name.startswith(("reward.", "ppo."))}
    words = ["recipes/compare_alpaca_gpt4_zh.yaml", *settings(tiny | {"model.path": model})]
    project.command(sys.executable, "-m", "flows.compare_methods", *words)
    table = (project.root / "reports" / "compare" / "alpaca-gpt4-zh" / "table.md").read_text()
    assert all(name in table for name in ("lora", "p_tuning", "freeze", "full"))


def test_the_model_learns_its_name_from_the_recipe_s_rows(tmp_path: Path) -> None:
    """alter_self_cognition's rows and settings, but twenty times its learning rate for a tiny untaught model."""
    recipe = read_recipe(ROOT / "recipes" / "alter_self_cognition_chatglm2.yaml")
    more = {"sft.learning_rate": 2e-2, "sft.lora_target": "all-linear", "sft.num_train_epochs": 4}
    with chdir(ROOT):
        params = load_params("params.yaml", recipe.overrides | WHO | more)
        fetch(["identity"], params.data.dataset_dir, tmp_path / "raw")
        counts = prepare(params.data, tmp_path / "raw", tmp_path / "rows")["sft"]["identity"]
    assert counts["kept"] == 80 and counts["test"] >= 4
    texts = [row["messages"][-1]["content"] for row in read_jsonl(tmp_path / "rows" / "sft" / "train.jsonl")]
    assert sum("小智" in text for text in texts) > 60 and not any("<" in text for text in texts)

    folder = ROOT / "tests" / "golden" / "chatglm2-e2e"
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype="float32")
    splits = {
        split: tokenize(tmp_path / "rows" / "sft" / f"{split}.jsonl", tokenizer, params.data, tmp_path / "cache")
        for split in ("train", "test")
    }
    before = sft.mean_loss(model, tokenizer, splits["test"], 8)
    torch.manual_seed(params.seed)
    calls = {"seed": 1, "log": lambda *_: None, "log_speed": lambda *_: None, "progress": lambda *_: None}
    tuned, _ = sft.train(model, tokenizer, splits["train"], [], params.sft, **calls)
    assert sft.mean_loss(tuned, tokenizer, splits["test"], 8) < 0.9 * before  # on questions that were held out
