"""The frame of a stage, run as the program it is: python toy.py in a project of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tasks.lineage import content_hash

ROOT = Path(__file__).parent.parent.parent

PIPELINE = """
stages:
  fetch: {cmd: python toy.py, outs: [data/raw]}
  sft:
    cmd: python toy.py
    deps: [toy.py, data/rows, models/base]
    params: [seed, model.dtype, sft]
    outs: [{models/sft: {persist: false}}, runs/sft.json]
    metrics: [metrics/sft.json: {cache: false}]
    plots: [plots/sft.csv]
"""

TRAINING = """
import random
import numpy, torch
stage.log_dataset("reviews", "data/rows", "train", 2)
weight = torch.zeros(3, requires_grad=True)
for step in range(1, 21):
    loss = ((weight - torch.randn(3)) ** 2).sum()
    loss.backward()
    weight.data -= 0.05 * weight.grad
    stage.log(step, {"loss": loss.item()})
    if step % 10 == 0:
        stage.log(step, {"eval_loss": loss.item() + random.random() + numpy.random.rand()})
    stage.log_speed(step, {"tokens_per_second": 100.0})
    stage.progress(step, 20, "training")
write_text("models/sft/order.txt", str({"a", "b", "c", "d"}) + str(weight))
return {"eval_loss": loss.item(), "rows": 2}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests: making its tables takes longer than a stage."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def project(folder: Path, body: str, step: str = "sft", uses_torch: bool = False) -> Path:
    """A folder with this repository's params.yaml and a stage whose `run` has the given body."""
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "data/rows").mkdir(parents=True)
    (folder / "data/rows/train.jsonl").write_text("{}\n{}\n")
    lines = "\n    ".join(body.strip().splitlines())
    (folder / "toy.py").write_text(
        "from glm.errors import InputError\nfrom glm.files import write_text\nfrom tasks.stage import main\n\n"
        f"def run(stage):\n    {lines}\n\nmain({step!r}, run, uses_torch={uses_torch})\n"
    )
    return folder


def environment(store: str, **more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("GLMFLOW_", "MLFLOW_", "DVC_"))}
    return clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": store} | more


def start(folder: Path, store: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "toy.py"], cwd=folder, env=environment(store, **more), capture_output=True, text=True
    )


def last_run(store: str) -> Run:
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("rlhf-pipeline").experiment_id
    return client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=1)[0]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_equal_runs_write_equal_bytes(tmp_path: Path, store: str) -> None:
    outputs = ("metrics/sft.json", "plots/sft.csv", "models/sft/order.txt")
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        folder = project(tmp_path / name, TRAINING, uses_torch=True)
        result = start(folder, store)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        made.append([(folder / output).read_bytes() for output in outputs])
    assert made[0] == made[1]

    table = made[0][1].decode().splitlines()
    assert table[0] == "step,eval_loss,loss"
    assert len(table) == 21
    assert table[1].startswith("1,,")
    step, eval_loss, loss = table[10].split(",")
    assert (int(step), repr(float(eval_loss)), repr(float(loss))) == (10, eval_loss, loss)
    assert json.loads(made[0][0]) == {"eval_loss": float(table[20].split(",")[2]), "rows": 2}

    record = json.loads((folder / "runs/sft.json").read_text())
    run = last_run(store)
    assert record["run_id"] == run.info.run_id
    assert record["steps"] == 20
    assert record["speed"] == {"tokens_per_second": 100.0}
    assert record["seconds"] > record["seconds_per_step"] > 0

    assert (run.info.status, run.info.run_name) == ("FINISHED", "sft")
    assert run.data.tags["dvc.in.data/rows"] == content_hash(folder / "data/rows")
    assert run.data.tags["dvc.out.models/sft"] == content_hash(folder / "models/sft")
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.data.params["sft.learning_rate"] == "0.002"
    assert "ppo.learning_rate" not in run.data.params
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == content_hash(folder / "data/rows")
    assert {tag.key: tag.value for tag in dataset.tags}["mlflow.data.context"] == "train"
    client = MlflowClient(store)
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 20
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id, "plots")] == ["plots/sft.png"]


def test_wrong_params_stop_before_anything_is_written(tmp_path: Path, store: str) -> None:
    folder = project(tmp_path, "return {}")
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    (folder / "params.yaml").write_text(params.replace("lora_rank: 16", "lora_rnak: 16"), encoding="utf-8")
    before = files(folder)
    result = start(folder, store)
    assert result.returncode == 2
    assert "sft.lora_rank" in result.stderr
    assert "Traceback" not in result.stderr
    assert files(folder) == before


def test_a_program_of_another_algorithm_is_refused(tmp_path: Path, store: str) -> None:
    folder = project(tmp_path, "return {}", step="dpo")
    done = start(folder, store)
    assert done.returncode == 2
    assert "algorithm is 'ppo', but this is python -m tasks.dpo: set algorithm: dpo" in done.stderr


def test_wrong_input_is_one_message_and_no_output(tmp_path: Path, store: str) -> None:
    folder = project(tmp_path, 'raise InputError("data/rows/train.jsonl: line 3: no answer")')
    result = start(folder, store)
    assert result.returncode == 2
    assert result.stderr == "data/rows/train.jsonl: line 3: no answer\n"
    assert not any(path.startswith(("metrics", "plots", "runs")) for path in files(folder))
    assert last_run(store).info.status == "FAILED"
    assert last_run(store).data.tags["error"] == "InputError: data/rows/train.jsonl: line 3: no answer"


def test_a_fault_of_the_program_fails_the_run_with_traceback(tmp_path: Path, store: str) -> None:
    folder = project(tmp_path, 'stage.log(1, {"loss": 2.0})\nreturn {"loss": 1 / 0}')
    result = start(folder, store)
    assert result.returncode == 1
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert not any(path.startswith(("metrics", "plots", "runs")) for path in files(folder))
    run = last_run(store)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "ZeroDivisionError: division by zero"
    assert run.data.metrics["loss"] == 2.0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_stage_kills_its_run(tmp_path: Path, store: str, number: signal.Signals, code: int) -> None:
    body = 'import time\nstage.log(1, {"loss": 2.0})\nwrite_text("started", "")\ntime.sleep(60)\nreturn {}'
    folder = project(tmp_path, body)
    process = subprocess.Popen([sys.executable, "toy.py"], cwd=folder, env=environment(store))
    while not (folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert last_run(store).info.status == "KILLED"
    assert last_run(store).data.metrics["loss"] == 2.0
    assert not any(path.startswith(("metrics", "plots", "runs")) for path in files(folder))


FLOW = """
import os, sys
from pathlib import Path
from flows import guard

command = ["sh", "-c", f"{sys.executable} toy.py; true"]  # the shell stays, as some of DVC's do
with guard.running(command, cwd=Path.cwd(), env=os.environ) as process:
    print(process.pid, flush=True)
"""


def test_a_stage_ends_where_its_flow_and_the_guard_are_killed_at_once(tmp_path: Path, store: str) -> None:
    body = 'import time\nstage.log(1, {"loss": 2.0})\nwrite_text("started", "")\ntime.sleep(60)\nreturn {}'
    folder = project(tmp_path, body)
    command = [sys.executable, "-c", FLOW]
    flow = subprocess.Popen(command, cwd=folder, env=environment(store), stdout=subprocess.PIPE, text=True)
    assert flow.stdout is not None
    guard = psutil.Process(int(flow.stdout.readline()))
    while not (folder / "started").exists():
        assert flow.poll() is None
        time.sleep(0.1)
    family = guard.children(recursive=True)
    assert len(family) == 2  # the shell and the stage
    guard.suspend()  # so that it sees nothing of what comes
    flow.kill()
    flow.communicate()
    guard.kill()
    left = psutil.wait_procs(family, timeout=20)[1]
    for process in left:
        process.kill()
    assert not left
    assert last_run(store).info.status == "KILLED"


def test_progress_goes_to_the_file_of_the_flow(tmp_path: Path, store: str) -> None:
    body = """
seen = [open("progress.json").read()]
for step in range(1, 101):
    stage.progress(step, 100, "训练")
seen.append(open("progress.json").read())
write_text("seen.json", str(seen))
return {}
"""
    folder = project(tmp_path, body, step="fetch")
    (folder / "data/raw").mkdir()
    assert start(folder, store, GLMFLOW_PROGRESS=str(folder / "progress.json")).returncode == 0
    first, last = map(json.loads, eval((folder / "seen.json").read_text()))
    assert first == {"step": "fetch", "done": 0, "total": 0, "text": "loading"}
    assert last == {"step": "fetch", "done": 100, "total": 100, "text": "训练"}


def test_a_missing_output_is_named(tmp_path: Path, store: str) -> None:
    result = start(project(tmp_path, "return {}", step="fetch"), store)
    assert result.returncode == 1
    assert "data/raw: an output of fetch in dvc.yaml, but the stage did not write it" in result.stderr
    assert last_run(store).info.status == "FAILED"


def test_only_outputs_of_dvc_yaml_are_written(tmp_path: Path, store: str) -> None:
    folder = project(tmp_path, "return {'rows': 2}", step="fetch")
    (folder / "data/raw").mkdir()
    assert start(folder, store).returncode == 0
    assert not any(path.startswith(("metrics", "plots", "runs")) for path in files(folder))
    assert last_run(store).data.metrics == {"rows": 2.0}


def test_content_hash_is_dvc_s(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "b/酒店.txt").write_text("房间很干净", encoding="utf-8")
    (folder / "b-c.txt").write_text("x\r\n")
    (folder / "a.bin").write_bytes(bytes(range(256)))
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["init", "--no-scm", "-q"], ["add", "-q", "data"]):
        subprocess.run([*dvc, *command], cwd=tmp_path, check=True, env=environment("", DVC_NO_ANALYTICS="1"))
    assert f"md5: {content_hash(folder)}\n" in (tmp_path / "data.dvc").read_text()


def test_the_frame_loads_without_torch_and_mlflow() -> None:
    code = "import sys, tasks.stage; print([m for m in ('torch', 'mlflow', 'numpy', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
