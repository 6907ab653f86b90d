"""Two processes on the CPU (gloo) do what one does on the same global batch: SFT, reward model and policies.

What needs DeepSpeed runs where it is installed, or lies in .venv/deepspeed, where `make test` puts it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glm.models import load_model
from glm.training.distributed import deal
from glm.training.packing import Packing, token_count
from glm.training.rank_trainer import shares
from tests.model import ranks
from tests.model.test_ppo import make_actors

ROOT = Path(__file__).parents[2]
DEEPSPEED = ROOT / ".venv" / "deepspeed"
HAS_DEEPSPEED = DEEPSPEED.exists() or importlib.util.find_spec("deepspeed") is not None
KINDS = (
    "sft-lora-packed-ddp",
    "sft-full-rows-fsdp",
    "sft-full-selective-deepspeed_zero3",
    "reward-lora-ddp",
    "ppo",
    "grpo-bnpo",
)
SLOW = (
    "sft-lora-padded-ddp",
    "sft-freeze-packed-ddp",
    "sft-full-packed-ddp",
    "reward-full-ddp",
    "reward-full-fsdp",
    "reward-full-deepspeed_zero3",
    "raft",
    "dpo",
    "rrhf",
    "kto",
    "grpo-dapo",
    "grpo-dr_grpo",
    "grpo-grpo",
    "rloo",
)
ROUNDING = ("rollout_gap", "eval_kl")  # differences of equal things, which rounding alone makes
LAUNCH = """
import os, sys
from glm.config import Launch
from tasks.launch import launch
os.environ["OMP_NUM_THREADS"] = "2"
sys.exit(launch(Launch(num_processes=2), ["-m", "tests.model.ranks", *sys.argv[1:]], "training"))
"""


def if_installed(kinds: tuple[str, ...]) -> list[Any]:
    """As parameters of a test, skipped where they need what is not here."""
    missing = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed: make .venv/deepspeed")
    return [pytest.param(kind, marks=missing if kind.endswith("zero3") else ()) for kind in kinds]


def two_processes(folder: Path, kinds: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAUNCH, str(folder), kinds, *more]
    python_path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(DEEPSPEED)]))
    env = os.environ | {"PYTHONPATH": python_path}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def points_of(folder: Path) -> dict[tuple[int, str], float]:
    curves = json.loads((folder / "result.json").read_text())["curves"]
    return {(step, name): value for step, values in curves for name, value in values.items()}


def assert_same(one: Path, two: Path) -> None:
    """Curves within 1e-5 relative, the same files, and weights that came the same way but for rounding."""
    points, same = points_of(one), points_of(two)
    assert points.keys() == same.keys()
    rounding = (*ROUNDING, "loss") if one.name == "rloo" else ROUNDING  # a mean of advantages, which cancel out
    for (step, name), value in points.items():
        tolerance = {"abs": 1e-5} if name in rounding else {"rel": 1e-5, "abs": 1e-6}
        assert same[step, name] == pytest.approx(value, **tolerance), (step, name)
    files = sorted(path.name for path in (one / "model").iterdir())
    assert files == sorted(path.name for path in (two / "model").iterdir())
    for name in files:
        if name == "adapter_config.json":  # in the order of a set, which a stage fixes
            configs = [json.loads((folder / "model" / name).read_text()) for folder in (one, two)]
            assert sorted(configs[0].pop("target_modules")) == sorted(configs[1].pop("target_modules"))
            assert configs[0] == configs[1]
            continue
        if not name.endswith(".safetensors"):
            assert (one / "model" / name).read_bytes() == (two / "model" / name).read_bytes(), name
            continue
        weights, others = load_file(one / "model" / name), load_file(two / "model" / name)
        assert {key: value.dtype for key, value in weights.items()} == {key: v.dtype for key, v in others.items()}
        for key, value in weights.items():
            if key.endswith("k_proj.bias"):  # softmax does not see it: its gradient is nothing but rounding
                continue
            far = (value - others[key]).abs() > 1e-5 * value.abs().max()
            assert far.float().mean() < 0.02, key  # AdamW takes whole steps where a gradient is nearly nothing


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    kinds = [kind for kind in KINDS if HAS_DEEPSPEED or not kind.endswith("zero3")]
    for kind in kinds:
        ranks.main(kind, folder / "one" / kind)
    (folder / "two").mkdir()
    (folder / "one" / "actors").rename(folder / "two" / "actors")
    done = two_processes(folder / "two", ",".join(kinds))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", if_installed(KINDS))
def test_two_processes_train_as_one_does(kind: str, both: Path) -> None:
    assert_same(both / "one" / kind, both / "two" / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", if_installed(SLOW))
def test_two_processes_train_as_one_does_by_every_way(kind: str, tmp_path: Path) -> None:
    ranks.main(kind, tmp_path / "one" / kind)
    (tmp_path / "two").mkdir()
    if (tmp_path / "one" / "actors").exists():
        (tmp_path / "one" / "actors").rename(tmp_path / "two" / "actors")
    done = two_processes(tmp_path / "two", kind)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one" / kind, tmp_path / "two" / kind)


def test_a_model_that_was_shared_out_loads_as_any(both: Path) -> None:
    kind = "sft-full-rows-fsdp"
    ids = torch.arange(5, 60)[None]
    models = [load_model(both / number / kind / "model") for number in ("one", "two")]
    with torch.no_grad():
        logits = [model(ids).logits for model in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", if_installed(("sft-full-rows-fsdp", "sft-full-selective-deepspeed_zero3")))
def test_when_one_is_killed_the_others_end_and_one_process_goes_on(kind: str, both: Path, tmp_path: Path) -> None:
    broken = two_processes(tmp_path, kind, "12")
    assert broken.returncode == 1
    assert "training: process 1 of 2 was ended by SIGKILL" in broken.stderr
    assert not (tmp_path / kind / "result.json").exists()
    assert sorted(path.name for path in (tmp_path / kind / "checkpoints").iterdir()) == ["step-10", "step-5"]
    ranks.main(kind, tmp_path / kind)
    assert_same(both / "one" / kind, tmp_path / kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    if_installed(("ppo", "sft-full-rows-fsdp", "sft-full-selective-deepspeed_zero3", "kto", "grpo-dapo", "rloo")),
)
def test_two_processes_go_on_where_one_was(kind: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ranks.main(kind, tmp_path / "broken" / kind, stop_at=12)
    done = two_processes(tmp_path / "broken", kind)
    assert done.returncode == 0, done.stderr
    ranks.main(kind, tmp_path / "one" / kind)
    assert_same(tmp_path / "one" / kind, tmp_path / "broken" / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", "kto", "grpo-dapo", "rloo"])
def test_one_process_goes_on_where_two_were(kind: str, tmp_path: Path) -> None:
    make_actors(tmp_path / "broken" / "actors")
    broken = two_processes(tmp_path / "broken", kind, "12")
    assert "process 1 of 2 was ended by SIGKILL" in broken.stderr
    assert (tmp_path / "broken" / kind / "checkpoints").exists()
    ranks.main(kind, tmp_path / "broken" / kind)
    ranks.main(kind, tmp_path / "one" / kind)
    assert_same(tmp_path / "one" / kind, tmp_path / "broken" / kind)


def test_dealing_is_fair() -> None:
    sizes = [60, 10, 50, 20, 40, 30, 7]
    dealt = deal(sizes, 3)
    assert sorted(index for hand in dealt for index in hand) == list(range(7))
    sums = [sum(sizes[index] for index in hand) for hand in dealt]
    assert max(sums) - min(sums) <= 10


def test_a_step_is_shared_by_tokens_and_full_rows_stay_together() -> None:
    def example(size: int) -> dict:
        return {"input_ids": [0] * size}

    step = [example(size) for size in (9, 8, 3, 2, 1, 1)]
    packing = Packing(tokens_per_row=64, multiple=1, max_sequences=8, max_length=9)
    found = shares(step, 2, packing)
    assert [sum(len(each["input_ids"]) for each in share) for share in found] == [12, 12]
    padded = shares(step, 2, None)
    assert [[len(each["input_ids"]) for each in share] for share in padded] == [[9, 3, 1], [8, 2, 1]]
    rows = [[example(4), example(4)], [example(7)], [example(5), example(3)], [example(8)]]
    assert all(isinstance(item, list) for share in shares(rows, 2, packing) for item in share)
    assert sum(len(each["input_ids"]) for each in shares(rows[:1], 2, packing)[0]) == 4
    assert shares([example(3)], 2, packing)[1] == []


def test_rankings_are_dealt_by_the_tokens_that_are_computed() -> None:
    prompts = [[number] * size for number, size in ((1, 40), (2, 10), (3, 5))]
    step = [{"sequences": [[*prompt, 8] + [9] * 4, [*prompt, 9] + [9] * 4]} for prompt in prompts]
    packing = Packing(tokens_per_row=64, multiple=1, max_sequences=8, max_length=50, max_answers=2)
    # 50, 20 and 15 tokens are computed; unshared it would be 90, 30 and 20
    assert [[token_count(each, packing) for each in share] for share in shares(step, 2, packing)] == [[50], [20, 15]]
    assert token_count(step, packing) == 85
    assert token_count(step, None) == 140
