"""The frame of a stage: what every `python -m tasks.<step>` does around its own `run(stage)`.

    def run(stage: Stage) -> dict[str, float]:
        ...                                     # heavy imports inside
        return {"eval_loss": 4.2}

    if __name__ == "__main__":
        main("sft", run)

`main` validates params.yaml, makes the process deterministic, opens the step's MLflow run, calls `run`, and writes
metrics/<step>.json, plots/<step>.csv and runs/<step>.json, as far as dvc.yaml names them. Exit status: 0 done, 1 a
fault of the program, 2 an InputError (nothing written), 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import csv
import hashlib
import io
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from glm.config import Params, load_params
from glm.errors import InputError
from glm.files import write_json, write_text
from tasks import STEPS, programs
from tasks.launch import Silence, first, follow_guard, follow_launcher, launch, launched, let_the_first_speak
from tasks.lineage import (
    StageEntry,
    content_hash,
    git_tags,
    input_hashes,
    lock_tags,
    machine_tags,
    stage_entry,
    stage_params,
    thread_number,
)
from tasks.step_run import StepRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = Callable[["Stage"], dict[str, float]]

PROGRESS_FILE = "GLMFLOW_PROGRESS"  # environment variable: where a flow reads how far the stage is
PROGRESS_SECONDS = 0.2
MAX_COPY_BYTES = 2**30


class Stopped(BaseException):
    """SIGTERM came."""


class Stage:
    """What `run` gets: the parameters, and where to put points, progress, datasets, models and figures."""

    def __init__(self, name: str, params: Params, tracker: StepRun | Silence, fingerprint: str) -> None:
        self.name = name
        self.params = params
        self.tracker = tracker
        self.fingerprint = fingerprint  # of the stage's inputs, code and parameters: what may resume what
        self.points: dict[int, dict[str, float]] = {}
        self.speeds: dict[str, list[float]] = {}
        self._times: list[tuple[int, float]] = []  # when the first and the last step were logged
        self._progress = Progress(name)

    @property
    def follows(self) -> bool:
        """Whether this is one of several processes and not the first, which alone writes what has been trained."""
        return not first()

    @property
    def checkpoint_folder(self) -> Path:
        """Where a killed run of the same stage is found again; no output, since DVC removes those before it starts."""
        return Path(".cache/checkpoints", self.name, self.fingerprint)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Points of the curves at one step: a row of plots/<step>.csv, and metrics in MLflow.

        They must repeat from run to run; what depends on the clock goes to `log_speed`.
        """
        values = {name: _number(value) for name, value in values.items()}
        self.points.setdefault(step, {}).update(values)
        self._times[1:] = [(step, time.monotonic())]
        self.tracker.log(step, values)

    def log_speed(self, step: int, values: dict[str, float]) -> None:
        """Points that depend on the clock (tokens per second, memory): MLflow, and their means in runs/<step>.json."""
        values = {name: _number(value) for name, value in values.items()}
        for name, value in values.items():
            self.speeds.setdefault(name, []).append(value)
        self.tracker.log(step, values)

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Say how far the stage is; call it as often as you like."""
        self._progress.show(done, total, text)

    def log_dataset(self, name: str, path: str | Path, split: str, rows: int, tokenised: str = "") -> None:
        """Record a file or folder as an input of the run, with its DVC hash as digest, and the key of its token ids."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = content_hash(path)
        source = json.dumps({"uri": str(Path(path).absolute())})
        dataset = Dataset(name, digest, "local", source, profile=json.dumps({"num_rows": rows}))
        tags = [InputTag("mlflow.data.context", split), InputTag("dvc_md5", digest), InputTag("rows", str(rows))]
        tags += [InputTag("tokenised", tokenised)] if tokenised else []
        self.tracker.write(lambda client, run_id: client.log_inputs(run_id, [DatasetInput(dataset, tags)]))

    def log_adapter(self, folder: str | Path) -> None:
        """Log what a stage has trained, with all that it stands on, as an MLflow model that answers chat requests."""
        from tasks.logged_models import artifact_folders, folder_size, log_chat_model

        folders, quantised = artifact_folders(str(folder))
        if sum(map(folder_size, folders)) <= MAX_COPY_BYTES:
            log = partial(log_chat_model, f"{self.name}-adapter", self.params.data, *folders, **quantised)
            self.tracker.write(lambda client, run_id: log())

    def log_reward_model(self, folder: str | Path) -> None:
        """Log a reward model, with all that it stands on, as an MLflow model that scores answers."""
        from tasks.logged_models import artifact_folders, folder_size, log_reward_model

        folders, quantised = artifact_folders(str(folder))
        if sum(map(folder_size, folders)) <= MAX_COPY_BYTES:
            log = partial(log_reward_model, self.name, self.params.data, *folders, **quantised)
            self.tracker.write(lambda client, run_id: log())

    def log_model(self, folder: str | Path) -> None:
        """Log an export, with what it stands on if it is an adapter, as an MLflow model that answers chat requests.

        Folders above MAX_COPY_BYTES are not copied for every run: flows/registry.py logs them when it registers.
        """
        from tasks.logged_models import artifact_folders, folder_size, log_chat_model

        folders, quantised = artifact_folders(folder)
        if sum(map(folder_size, folders)) <= MAX_COPY_BYTES:
            tags = {"dvc_md5": content_hash(folder)}
            log = partial(log_chat_model, self.name, self.params.data, *folders, **quantised, tags=tags)
            self.tracker.write(lambda client, run_id: log())

    def log_figure(self, name: str, figure: "Figure") -> None:
        """Keep a matplotlib figure with the run, under plots/."""
        self.tracker.write(lambda client, run_id: client.log_figure(run_id, figure, f"plots/{name}"))

    def log_json(self, path: str, value: Any) -> None:
        """Keep a JSON value with the run, as the artifact `path`."""
        self.tracker.write(lambda client, run_id: client.log_dict(run_id, value, path))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a copy of a file or folder with the run."""
        self.tracker.write(lambda client, run_id: client.log_artifact(run_id, str(path), folder))

    @property
    def seconds_per_step(self) -> float | None:
        """Between the first and the last logged step; None before there are two."""
        if len(self._times) < 2 or self._times[0][0] == self._times[1][0]:
            return None
        (first, start), (last, end) = self._times
        return (end - start) / (last - first)


class Progress:
    """Shows how far a stage is: in the file that GLMFLOW_PROGRESS names, else as a bar if stderr is a terminal."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        self.name = name
        self.path = os.environ.get(PROGRESS_FILE) if first() else None
        shown = first() and not self.path and sys.stderr.isatty()
        self.bar = tqdm(desc=name, disable=not shown, mininterval=PROGRESS_SECONDS)
        self.next_write = 0.0
        self.show(0, 0, "loading")

    def show(self, done: int, total: int, text: str = "") -> None:
        self.bar.total = total
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if self.path and (time.monotonic() >= self.next_write or done == total):
            self.next_write = time.monotonic() + PROGRESS_SECONDS
            state = {"step": self.name, "done": done, "total": total, "text": text}
            write_text(self.path, json.dumps(state, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.bar.close()


def main(program: str, run: Run, uses_torch: bool = True, *, shared: bool = False) -> None:
    """Run one stage in this process and exit. A stage without torch says so and starts two seconds earlier.

    `program` is the caller's own name, tasks/<program>.py: that of its step, or an algorithm. A `shared` stage runs in
    launch.num_processes processes: if more than one is wanted, this one starts them and waits.
    """
    fix_environment()
    signal.signal(signal.SIGTERM, _stop)
    try:
        follow_guard()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("glm").setLevel(logging.INFO if first() else logging.ERROR)  # what the library chose
        params = load_params()
        entry = stage_entry(step_of(program, params), params.algorithm)
        if shared and params.launch.num_processes > 1 and not launched():
            sys.exit(launch(params.launch, sys.orig_argv[1:], program))
        seed_everything(params.seed, uses_torch)
        if shared and launched():
            join_processes()
        run_stage(program, run, params, entry)
    except InputError as error:
        let_the_first_speak()
        print(error, file=sys.stderr)
        sys.exit(2)
    except Stopped:
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        let_the_first_speak()
        traceback.print_exc()
        sys.exit(1)


def step_of(program: str, params: Params) -> str:
    """The stage of dvc.yaml that `program` runs.

    Raises:
        InputError: it is an algorithm, and params.yaml names another one.
    """
    names = programs(params.algorithm)
    if program not in names:
        raise InputError(
            f"params.yaml: algorithm is {params.algorithm!r}, but this is python -m tasks.{program}: set algorithm: "
            f"{program}, or call tasks.{params.algorithm}"
        )
    return STEPS[names.index(program)]


def run_stage(step: str, run: Run, params: Params, entry: StageEntry) -> None:
    """Call `run` inside the MLflow run of the program `step` and write what it returned."""
    started = time.monotonic()
    hashes = {f"dvc.in.{path}": digest for path, digest in input_hashes(entry).items()}
    experiment = {"glmflow.dvc_exp_name": os.environ["DVC_EXP_NAME"]} if "DVC_EXP_NAME" in os.environ else {}
    used = stage_params(params, entry)
    fingerprint = hashlib.sha256(json.dumps([hashes, used], sort_keys=True).encode()).hexdigest()[:16]
    if not first():
        run(Stage(step, params, Silence(), fingerprint))
        return
    tags = {"glmflow.step": step} | git_tags() | lock_tags() | machine_tags() | experiment | hashes
    tracker = StepRun(step, params, used, tags)
    stage = Stage(step, params, tracker, fingerprint)
    names = programs(params.algorithm)
    done = names[: names.index(step)]
    try:
        metrics = {name: _number(value) for name, value in run(stage).items()}
        _write_outputs(stage, entry, metrics)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run is being closed
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        tracker.finish(status, {"error": f"{type(error).__name__}: {error}"[:5000]})
        tracker.update_parent(status, done)
        raise
    finally:
        stage._progress.close()

    last_step = max(stage.points, default=0)
    tracker.log(last_step, metrics)
    if stage.points:
        from glm.evaluation.curves import draw_curves

        stage.log_figure(f"{step}.png", draw_curves(stage.points, step))
    outs = {f"dvc.out.{path}": content_hash(path) for path in _made_by_run(entry)}
    run_id = tracker.finish("FINISHED", outs)
    if f"runs/{step}.json" in entry.outs:
        write_json(f"runs/{step}.json", _run_record(stage, tracker, run_id, time.monotonic() - started))
    tracker.update_parent("FINISHED", [*done, step])


def fix_environment() -> None:
    """Same machine, same params.yaml, same bytes: set what is read when Python and the BLAS start, and start again.

    The order of sets reaches files (peft's target_modules, for one); a sum's rounding depends on how many threads split
    it, so their number must not depend on the load (threads that wait must not spin, or other work on these cores
    makes a small model ten times slower); cuBLAS is deterministic only with a fixed workspace.
    """
    fixed = {
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(thread_number()),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    missing = {name: value for name, value in fixed.items() if not os.environ.get(name)}
    if missing:
        os.environ.update(missing)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def join_processes() -> None:
    """Take this process's place among those that the launcher has started."""
    from glm.training import distributed

    follow_launcher()
    distributed.join()


def seed_everything(seed: int, uses_torch: bool) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    if uses_torch:
        import torch

        torch.manual_seed(seed)
        torch.set_num_threads(thread_number())
        # Some CUDA kernels have no deterministic form (a float cumsum, in sampling): warn there instead of failing.
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        torch.utils.deterministic.fill_uninitialized_memory = False  # else every new tensor is written twice


def _made_by_run(entry: StageEntry) -> list[str]:
    return [path for path in entry.outs if not path.startswith("runs/")]


def _write_outputs(stage: Stage, entry: StageEntry, metrics: dict[str, float]) -> None:
    for path in _made_by_run(entry):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: an output of {stage.name} in dvc.yaml, but the stage did not write it")
    if f"metrics/{stage.name}.json" in entry.metrics:
        write_json(f"metrics/{stage.name}.json", metrics)
    if f"plots/{stage.name}.csv" in entry.plots:
        write_text(f"plots/{stage.name}.csv", _table(stage.points))


def _table(points: dict[int, dict[str, float]]) -> str:
    """Wide CSV: the step, then every curve in alphabetical order; blank where nothing was measured."""
    names = sorted({name for values in points.values() for name in values})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *names])
    for step in sorted(points):
        writer.writerow([step, *(repr(points[step][name]) if name in points[step] else "" for name in names)])
    return text.getvalue()


def _run_record(stage: Stage, tracker: StepRun, run_id: str | None, seconds: float) -> dict[str, Any]:
    """What differs between two equal runs: who made the output, when and how fast."""
    tags = tracker.tags
    return {
        "run_id": run_id,
        "experiment_id": tracker.experiment_id,
        "seconds": round(seconds, 3),
        "seconds_per_step": stage.seconds_per_step,
        "steps": max(stage.points, default=0),
        "cpu_seconds": round(time.process_time(), 1),  # of all threads; unlike the clock's, not of other work
        "peak_memory_gb": _peak_memory() / 1e9,
        "speed": {name: sum(values) / len(values) for name, values in stage.speeds.items()},
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": tags["machine.host"],
    }


def _peak_memory() -> int:
    """Bytes: the most that tensors held on the GPU; without one, the most of this process that was in memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count what the parent had before exec
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _number(value: Any) -> float:
    """A plain Python number, from numpy's and torch's as well."""
    return value if type(value) is int else float(value)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough; the run is being closed
    raise Stopped("SIGTERM")
