"""A stand-in for a stage where only the orchestration is under test: its outputs are a function of its parameters.

Environment: EXECUTED names a file that gets a line for each execution; SLEEP_<step> is a number of seconds;
FAIL_<step> is an exit status.
"""

import json
import os
import sys
import time
from pathlib import Path

from glm.config import load_params
from glm.files import write_json, write_text
from tasks.lineage import stage_entry, stage_params
from tasks.stage import step_of


def main(program: str) -> None:
    with open(os.environ["EXECUTED"], "a") as file:
        file.write(f"{program}\n")
    print(f"this is {program}", flush=True)
    seconds = float(os.environ.get(f"SLEEP_{program}", "0"))
    for tenth in range(int(10 * seconds)):
        time.sleep(0.1)
        write_json(os.environ["GLMFLOW_PROGRESS"], {"step": program, "done": tenth, "total": 10 * seconds, "text": ""})
    if status := os.environ.get(f"FAIL_{program}"):
        print(f"{program} fell over", file=sys.stderr)
        sys.exit(int(status))
    params = load_params()
    entry = stage_entry(step_of(program, params), params.algorithm)
    used = stage_params(params, entry)
    for path in map(Path, [*entry.outs, *entry.metrics, *entry.plots]):
        if path.parent == Path("runs"):
            write_json(path, {"run_id": None, "seconds": seconds, "steps": 3, "seconds_per_step": 0.1})
        elif path.parent == Path("metrics"):
            losses = {"base.loss": 5.0, "sft.loss": 3.0, f"{params.algorithm}.loss": 3.1}
            write_json(path, losses | {"reward.accuracy": 0.8})
        elif path.parent == Path("plots"):
            write_text(path, "step,loss\n1,3.0\n2,2.0\n")
        else:
            write_json(path / "made_with.json", used)
    if program == "evaluate":
        sample = {"prompt": "写一条酒店评论", "base": "的的的", "sft": "酒店很好", params.algorithm: "非常满意[bold]"}
        write_text("reports/evaluate/samples.json", json.dumps([sample] * 3, ensure_ascii=False))
