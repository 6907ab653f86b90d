"""What the orchestration costs beside the bare scripts: `python -m benchmarks.orchestration`, on an idle machine.

It works in a temporary copy of the checkout whose stages do nothing but tell the time, with the real frame of a stage
(tasks/stage.py), Prefect, DVC and MLflow around them. Prints a table; exit status 1 if a bound is missed.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from prefect.settings import PREFECT_API_URL
from rich.console import Console
from rich.table import Table

from flows.server import prefect_api
from tasks import programs
from tests.pipeline.conftest import Project, copy_checkout, last_run, query

ROUNDS = 3
STEP = "sft"  # the stage that is looked at
TRAINING_STEPS, STEP_SECONDS = 150, 0.2  # as the embedded default trains
STAGE = f"""
import json, sys, time
from pathlib import Path
from tasks.stage import main

def run(stage):
    times = [time.time()]
    logging = cpu = 0.0
    for step in range(1, {TRAINING_STEPS} + 1 if "TRAIN" in __import__("os").environ else 1):
        time.sleep({STEP_SECONDS})
        before, used = time.perf_counter(), time.thread_time()
        stage.log(step, {{"loss": 1.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "entropy": 2.0}})
        stage.log_speed(step, {{"tokens_per_second": 1e4, "memory_gb": 1.0}})
        logging += time.perf_counter() - before
        cpu += time.thread_time() - used
    for path in ("models/{STEP}", ):
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "made_with.json").write_text("{{}}")
    times.append(time.time())
    Path("times.json").write_text(json.dumps(times + [logging, cpu]))
    return {{"loss": 1.0}}

if __name__ == "__main__":
    main("{STEP}", run, uses_torch=False)
"""


def main() -> int:
    """Measure and print. Returns the exit status."""
    table = Table("what", "seconds", "CPU seconds", "bound", title=f"Orchestration, best of {ROUNDS}")
    missed = []

    def row(what: str, seconds: float, bound: float | None = None, cpu: float | None = None, unit: str = "") -> None:
        limit = "" if bound is None else f"< {bound:g}{unit}"
        table.add_row(what, f"{seconds:.2f}{unit}", "" if cpu is None else f"{cpu:.1f}", limit)
        if bound is not None and seconds >= bound:
            missed.append(what)

    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder))
        project.flow()
        seconds, cpu = best(lambda: project.dvc("repro"))
        row("dvc repro, nothing to do", seconds, 5, cpu)
        seconds, cpu = best(lambda: project.flow())
        row("cached flow, own server", seconds, 15, cpu)

        bare = [bare_stage(project) for _ in range(ROUNDS)]
        row("bare script: start to its first line", min(start for start, _ in bare))
        row("bare script: last line to exit", min(end for _, end in bare))
        os.environ.pop("PREFECT_API_URL", None)
        with prefect_api():
            project.env["PREFECT_API_URL"] = str(PREFECT_API_URL.value())
            seconds, cpu = best(lambda: project.flow())
            row("cached flow, running server", seconds, 15, cpu)
            flow = [flow_stage(project, seed) for seed in range(ROUNDS)]
        row("in the flow: task's start to first line", min(start for start, _ in flow), 4)
        row("in the flow: last line to task's end", min(end for _, end in flow), 4)
        seconds, cpu = logging_share(project)
        row("MLflow logging, share of training", 100 * seconds, 1, unit=" %")
        row("MLflow logging, CPU seconds in it", 100 * cpu, 1, unit=" %")
    Console().print(table)
    print(f"Load of the machine now: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.")
    if missed:
        print(f"missed: {', '.join(missed)}")
    return bool(missed)


def make_project(folder: Path) -> Project:
    """A copy of the checkout with trivial stages, but for STEP, which has the real frame."""
    root, home = folder / "project", folder / "home"
    home.mkdir()
    copy_checkout(root)
    (root / "tasks" / "trivial.py").write_text(Path("tests/pipeline/trivial_stage.py").read_text())
    for step in programs("ppo"):
        (root / "tasks" / f"{step}.py").write_text(f"from tasks.trivial import main\n\nmain({step!r})\n")
    (root / "tasks" / f"{STEP}.py").write_text(STAGE)
    with (root / "flows" / "registry.py").open("a") as file:
        file.write(Path("tests/pipeline/trivial_registry.py").read_text())
    project = Project(root, home, None)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    return project


def best(what: Callable[[], object]) -> tuple[float, float]:
    """The least of ROUNDS: seconds, and CPU seconds of what it started, to which other work adds less."""
    seconds, cpu = [], []
    for _ in range(ROUNDS):
        start, used = time.perf_counter(), children_cpu()
        what()
        seconds.append(time.perf_counter() - start)
        cpu.append(children_cpu() - used)
    return min(seconds), min(cpu)


def children_cpu() -> float:
    """CPU seconds of the processes that this one started and that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def bare_stage(project: Project) -> tuple[float, float]:
    """Seconds from `python -m tasks.STEP` to its first line, and from its last to its exit."""
    start = time.time()
    project.command(sys.executable, "-m", f"tasks.{STEP}")
    end = time.time()
    first, last, *_ = times(project)
    return first - start, end - last


def flow_stage(project: Project, seed: int) -> tuple[float, float]:
    """The same in a flow, from the start of its Prefect task, and to its end."""
    project.set_param("sft.logging_steps", str(10 + seed), str(11 + seed))
    project.flow()
    first, last, *_ = times(project)
    api = project.env["PREFECT_API_URL"]
    tasks = query(api, "task_runs/filter", {"flow_runs": {"id": {"any_": [last_run(api)["id"]]}}})
    (task,) = (task for task in tasks if task["name"] == STEP)
    start, end = (datetime.fromisoformat(task[key]).timestamp() for key in ("start_time", "end_time"))
    return first - start, end - last


def logging_share(project: Project) -> tuple[float, float]:
    """Seconds, and CPU seconds, in `stage.log` a second of a training with steps as long as the embedded default's."""
    project.command(sys.executable, "-m", f"tasks.{STEP}", TRAIN="1")
    first, last, logging, cpu = times(project)
    return logging / (last - first), cpu / (last - first)


def times(project: Project) -> list[float]:
    """First line, last line, seconds and CPU seconds of logging, as the stage wrote them."""
    return json.loads((project.root / "times.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
