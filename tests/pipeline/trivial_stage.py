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
from tasks.lineage import content_hash, stage_entry, stage_params


def metrics(used: dict[str, Any]) -> dict[str, float]:
    """Numbers that tell ranks and seeds apart; those of params.yaml give SFT a loss of 3."""
    loss = 3.0 + (used.get("sft.lora_rank", 16) - 16) / 100 + (used.get("seed", 42) - 42) / 10
    return {"base.loss": 5.0, "sft.loss": loss, "ppo.loss": 3.1, "ppo.kl": 6.0, "reward.accuracy": 0.8}


def main(step: str) -> None:
    with open(os.environ["EXECUTED"], "a") as file:
        file.write(f"{step}\n")
    print(f"this is {step}", flush=True)
    seconds = float(os.environ.get(f"SLEEP_{step}", "0"))
    for tenth in range(int(10 * seconds)):
        time.sleep(0.1)
        write_json(os.environ["GLMFLOW_PROGRESS"], {"step": step, "done": tenth, "total": 10 * seconds, "text": ""})
    rank = load_params().sft.lora_rank
    if status := os.environ.get(f"FAIL_{step}") or os.environ.get(f"FAIL_{step}_{rank}"):
        print(f"{step} fell over", file=sys.stderr)
        sys.exit(int(status))
    entry = stage_entry(step)
    used = stage_params(load_params(), entry)
    read = {dep: content_hash(dep) for dep in entry.deps if dep.startswith(("data", "prepared", "models"))}
    for path in map(Path, [*entry.outs, *entry.metrics, *entry.plots]):
        if path.parent == Path("runs"):
            write_json(path, {"run_id": None, "seconds": seconds, "steps": 3, "seconds_per_step": 0.1})
        elif path.parent == Path("metrics"):
            model = Path("models/sft/made_with.json")
            write_json(path, metrics(json.loads(model.read_text()) if step == "evaluate_sft" else used))
        elif path.parent == Path("plots"):
            write_text(path, "step,loss\n1,3.0\n2,2.0\n")
        else:
            write_json(path / "made_with.json", used | read)
    if step == "evaluate":
        sample = {"prompt": "写一条酒店评论", "base": "的的的", "sft": "酒店很好", "ppo": "非常满意[bold]"}
        write_text("reports/evaluate/samples.json", json.dumps([sample] * 3, ensure_ascii=False))
