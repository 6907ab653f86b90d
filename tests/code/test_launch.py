"""A stage in two processes: one log, one MLflow run, one error, and an end for all when one of them ends."""

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from glm.config import Launch, load_params
from glm.errors import InputError
from tasks.inputs import check_inputs
from tasks.launch import exit_status, launch
from tests.code.test_stage import environment, files, last_run, project

ROOT = Path(__file__).parents[2]

TRAINING = """
import os, signal, time, torch, torch.distributed as dist
from pathlib import Path
if os.environ.get("WRONG"):
    raise InputError("data.sft: nothing there")
for step in range(1, 6):
    if os.environ.get("DIE") == f"{dist.get_rank()} {step}":
        os.kill(os.getpid(), signal.SIGKILL)
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    stage.log(step, {"sum": value.item()})
    stage.progress(step, 5)
    if os.environ.get("SLOW"):
        Path("started").touch()
        time.sleep(0.5)
if stage.follows:
    return {}
write_text("models/sft/who.txt", f"{dist.get_rank()} of {dist.get_world_size()}")
return {"sum": value.item()}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    folder = project(tmp_path, TRAINING, uses_torch=True)
    toy = (folder / "toy.py").read_text()
    (folder / "toy.py").write_text(toy.replace("uses_torch=True", "shared=True"))
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(params.replace("num_processes: 1", "num_processes: 2"), encoding="utf-8")
    return folder


def start(folder: Path, store: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "toy.py"],
        cwd=folder,
        env=environment(store, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def of_folder(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_process_ends_the_stage_and_the_next_run_is_whole(stage: Path, store: str) -> None:
    broken = start(stage, store, DIE="1 3")
    _, errors = broken.communicate(timeout=120)
    assert broken.returncode == 1
    assert "sft: process 1 of 2 was ended by SIGKILL, so the others were stopped; give the same command again" in errors
    assert of_folder(stage) == []
    assert last_run(store).info.status in ("FAILED", "KILLED")
    assert not (stage / "metrics/sft.json").exists()

    whole = start(stage, store)
    _, errors = whole.communicate(timeout=120)
    assert (whole.returncode, errors) == (0, "")
    assert (stage / "models/sft/who.txt").read_text() == "0 of 2"
    assert (stage / "plots/sft.csv").read_text() == "step,sum\n" + "".join(f"{step},3.0\n" for step in range(1, 6))
    assert {"metrics/sft.json", "runs/sft.json"} <= files(stage)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("rlhf-pipeline").experiment_id
    assert len(client.search_runs([experiment])) == 2  # one of each start
    assert last_run(store).info.status == "FINISHED"
    assert last_run(store).data.tags["machine.processes"] == "2"


def test_an_error_that_all_have_is_told_once(stage: Path, store: str) -> None:
    refused = start(stage, store, WRONG="yes")
    _, errors = refused.communicate(timeout=120)
    assert (refused.returncode, errors) == (2, "data.sft: nothing there\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_processes_never_outlive_what_started_them(stage: Path, store: str, number: signal.Signals) -> None:
    process = start(stage, store, SLOW="yes")
    deadline = time.monotonic() + 120
    while not (stage / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL}.get(number, 128 + number)
    psutil.wait_procs(of_folder(stage), timeout=15)
    assert of_folder(stage) == []


def test_the_exit_status_is_that_of_who_failed_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("sft", 2, {0: -signal.SIGTERM, 1: 2}) == 2
    assert exit_status("sft", 2, {0: 1}) == 1
    assert capsys.readouterr().err == ""
    assert exit_status("sft", 2, {0: 1, 1: -signal.SIGKILL}) == 1
    assert "process 1 of 2 was ended by SIGKILL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "kto", "kto.batch_size": 9}, ["num_processes 2: kto.batch_size 9", "a multiple of 2"]),
        ({"algorithm": "kto", "kto.batch_size": 2}, ["kto.batch_size 2", "at least 4"]),
        (
            {
                "algorithm": "grpo",
                "grpo.batch_size": 3,
                "grpo.num_generations": 6,
                "grpo.gradient_accumulation_steps": 2,
            },
            [
                "num_processes 2: grpo.batch_size 3 x num_generations 6",
                "gradient_accumulation_steps 2",
                "multiple of 2",
            ],
        ),
        (
            {"algorithm": "rloo", "rloo.batch_size": 5, "rloo.num_generations": 5},
            ["rloo.batch_size 5", "multiple of 2"],
        ),
        ({"ppo.mini_batch_size": 1}, ["num_processes 2", "1 of ppo.mini_batch_size"]),
        (
            {"launch.strategy": "fsdp", "sft.method": "full", "sft.optim": "adafactor"},
            ["launch.strategy fsdp", "sft.optim adafactor"],
        ),
        (
            {"launch.strategy": "deepspeed_zero3", "reward.method": "full", "reward.optim": "adamw_8bit"},
            ["launch.strategy deepspeed_zero3", "reward.optim adamw_8bit"],
        ),
        ({"launch.num_processes": 0}, ["launch.num_processes"]),
    ],
)
def test_what_processes_cannot_share_is_refused(changes: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_params(ROOT / "params.yaml", {"launch.num_processes": 2} | changes)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is here")
def test_a_missing_engine_is_named_before_anything_runs() -> None:
    params = load_params(ROOT / "params.yaml", {"launch.num_processes": 2, "launch.strategy": "deepspeed_zero3"})
    with pytest.raises(
        InputError, match=r"launch.strategy deepspeed_zero3.*pip install -r requirements-deepspeed.lock"
    ):
        check_inputs(params)
    with pytest.raises(InputError, match="needs DeepSpeed"):
        launch(params.launch, ["-c", ""], "sft")


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU: any number of processes will do")
def test_every_process_wants_a_gpu() -> None:
    import torch

    many = Launch(num_processes=torch.cuda.device_count() + 1)
    with pytest.raises(InputError, match=r"launch.num_processes: \d+, but this machine has"):
        launch(many, ["-c", ""], "sft")
