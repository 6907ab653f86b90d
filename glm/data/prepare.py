"""Fetched files → checked, de-duplicated rows, split into train, dev and test.

A row's split depends on the hash of its group, or of its first question, alone. So it never changes when another
dataset is added, and no question is trained on in one stage and tested in another.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from glm.config import Data
from glm.data.formats import read_rows
from glm.data.registry import Entry
from glm.data.rows import SPLITS, Row, Use, question_of
from glm.errors import InputError
from glm.files import replace_folder, write_json, write_jsonl

USES: tuple[Use, ...] = ("text", "sft", "reward", "ppo")


def split_of(question: str, dev_ratio: float, test_ratio: float) -> str:
    """train, dev or test by the question's hash: the same on every machine, for every mix of datasets."""
    position = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) / 2**64
    return "test" if position < test_ratio else "dev" if position < test_ratio + dev_ratio else "train"


def prepare(params: Data, raw: str | Path, out: str | Path) -> dict[str, Any]:
    """Write `out`/<use>/<split>.jsonl and `out`/report.json, and return the report.

    The report counts per use and dataset: read, kept, dropped by reason, and kept per split; kept + dropped = read.

    Raises:
        InputError: a file cannot be parsed, or a split that a stage needs would be empty.
    """
    raw = Path(raw)
    sources = json.loads((raw / "sources.json").read_text(encoding="utf-8"))
    with replace_folder(out) as folder:
        report: dict[str, Any] = {}
        for use in USES:
            names: list[str] = getattr(params, use)
            seen: set[str] = set()
            splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
            report[use] = {}
            for name in names:
                entry = Entry.model_validate(sources[name]["entry"])
                report[use][name] = _read_one(name, entry, raw / name, use, params, seen, splits)
            for split in SPLITS:
                if names and not splits[split] and not (split == "dev" and params.dev_ratio == 0):
                    raise InputError(
                        f"data.{use} ({', '.join(names)}): no rows are left for {split}; read and dropped: "
                        f"{json.dumps(report[use], ensure_ascii=False)}"
                    )
                write_jsonl(folder / use / f"{split}.jsonl", splits[split])
        write_json(folder / "report.json", report)
    return report


def _read_one(
    name: str, entry: Entry, folder: Path, use: Use, params: Data, seen: set[str], splits: dict[str, list[Row]]
) -> dict[str, Any]:
    """Sort one dataset's rows into `splits` and count what happened to each."""
    read, dropped = 0, Counter[str]()
    mine: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for _, row, why in read_rows(name, entry, folder, use):
        read += 1
        if row is None:
            dropped[why] += 1
            continue
        content = json.dumps({key: value for key, value in row.items() if key != "id"}, sort_keys=True)
        if content in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(content)
        mine[split_of(row.get("group") or question_of(row), params.dev_ratio, params.test_ratio)].append(row)
    for split, rows in mine.items():
        if params.max_samples is not None and len(rows) > params.max_samples:
            # By hash and not by position: files are often sorted, and the choice must not move when rows are added.
            chosen = sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())
            keep = {row["id"] for row in chosen[: params.max_samples]}
            dropped["max_samples"] += len(rows) - len(keep)
            rows = [row for row in rows if row["id"] in keep]
            mine[split] = rows
        splits[split] += rows
    kept = {split: len(rows) for split, rows in mine.items()}
    return {"read": read, "kept": sum(kept.values()), "dropped": dict(sorted(dropped.items())), **kept}
