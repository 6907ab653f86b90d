"""A stand-in for `python -m tasks.judge`: the challenger is better than the champion by GAIN in every row."""

import os
import sys

from glm.files import write_json, write_jsonl

gain = float(os.environ.get("GAIN", "1"))
champion = "--champion" in sys.argv
rows = []
for number in range(20):
    row = {"id": str(number), "prompt": "?", "challenger": {"answer": "很好", "reward": number + gain}}
    row["challenger"] |= {"nats_per_character": 2.0, "rouge_l": 20.0}
    if champion:
        row["champion"] = row["challenger"] | {"reward": float(number)}
    rows.append(row)
os.makedirs("reports/judge", exist_ok=True)
write_jsonl("reports/judge/rows.jsonl", rows)
write_json("reports/judge/summary.json", {"challenger": {"repetition": 0.1, "latency": 0.2}})
