"""A stand-in for a stage where only the orchestration is under test: its outputs follow from inputs and parameters.

Environment: EXECUTED names a file that gets a line for each execution; SLEEP_<step> is a number of seconds;
FAIL_<step>, or FAIL_<step>_<sft.lora_rank>, is an exit status.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from glm.config import load_params
from glm.files import write_json, write_text
from tasks.launch import follow_guard
from tasks.lineage import content_hash, stage_entry, stage_params
from tasks.stage import step_of


def metrics(used: dict[str, Any], algorithm: str) -> dict[str, float]:
    """Numbers that tell ranks and seeds apart; those of params.yaml give SFT a loss of 3."""
    loss = 3.0 + (used.get("sft.lora_rank", 16) - 16) / 100 + (used.get("seed", 42) - 42) / 10
    policy = {f"{algorithm}.loss": 3.1, f"{algorithm}.kl": 6.0}
    return {"base.loss": 5.0, "sft.loss": loss, **policy, "reward.accuracy": 0.8}


def main(program: str) -> None:
    follow_guard()
    with open(os.environ["EXECUTED"], "a") as file:
        file.write(f"{program}\n")
    print(f"this is {program}", flush=True)
    seconds = float(os.environ.get(f"SLEEP_{program}", "0"))
    for tenth in range(int(10 * seconds)):
        time.sleep(0.1)
        write_json(os.environ["GLMFLOW_PROGRESS"], {"step": program, "done": tenth, "total": 10 * seconds, "text": ""})
    params = load_params()
    rank = params.sft.lora_rank
    if status := os.environ.get(f"FAIL_{program}") or os.environ.get(f"FAIL_{program}_{rank}"):
        print(f"{program} fell over", file=sys.stderr)
        sys.exit(int(status))
    entry = stage_entry(step_of(program, params), params.algorithm)
    used = stage_params(params, entry)
    read = {dep: content_hash(dep) for dep in entry.deps if dep.startswith(("data", "prepared", "models"))}
    for path in map(Path, [*entry.outs, *entry.metrics, *entry.plots]):
        if path.parent == Path("runs"):
            write_json(path, {"run_id": None, "seconds": seconds, "steps": 3, "seconds_per_step": 0.1})
        elif path.parent == Path("metrics"):
            made_with = used
            if program == "evaluate_sft":
                made_with = json.loads(Path("models/sft/made_with.json").read_text())
            write_json(path, metrics(made_with, params.algorithm))
        elif path.parent == Path("plots"):
            write_text(path, "step,loss\n1,3.0\n2,2.0\n")
        else:
            write_json(path / "made_with.json", used | read)
    if program in ("evaluate_sft", "evaluate"):
        sample = {"prompt": "写一条酒店评论", "base": "的的的", "sft": "酒店很好", params.algorithm: "非常满意[bold]"}
        write_text(f"reports/{program}/samples.json", json.dumps([sample] * 3, ensure_ascii=False))
