"""What preprocessing did to each dataset, in numbers: read = kept + dropped, and what the kept rows are like."""

import json
from array import array
from bisect import bisect_right
from collections import Counter
from typing import Any

from glm.data.text import LANGUAGES

EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens: lower bounds of the histogram's bins
SHOWN = 20  # dropped rows that the report names one by one, per reason at most a quarter of it
REASONS = 30
LONGEST = 5
DUPLICATES = ("duplicate", "near duplicate")


class DatasetReport:
    """Counts of one dataset in one use."""

    def __init__(self, counted_by: str) -> None:
        self.counted_by = counted_by
        self.read = 0
        self.broken = 0  # of the dropped ones, how many did not parse
        self.dropped = Counter[str]()
        self.dropped_rows: list[dict[str, Any]] = []
        self.kept = {"train": 0, "dev": 0, "test": 0}
        self.repeated = 0
        self.truncated = 0
        self.lengths = array("I")
        self.longest: list[tuple[int, str]] = []
        self.languages = Counter[int]()

    def drop(self, identity: str, line: int | None, reason: str) -> None:
        """Count a dropped row, and name it while there is room; reasons that quote a file may be of any number."""
        if reason not in self.dropped and len(self.dropped) >= REASONS:
            reason = "other reasons"
        self.dropped[reason] += 1
        if self.dropped[reason] <= SHOWN // 4 and len(self.dropped_rows) < SHOWN:
            place = {"line": line} if line is not None else {}
            self.dropped_rows.append({"id": identity, **place, "reason": reason})

    def keep(self, split: str, line: str, tokens: int, truncated: int, language: int) -> None:
        """Count a kept row; `line` is its JSON."""
        self.kept[split] += 1
        self.truncated += truncated
        self.lengths.append(tokens)
        self.languages[language] += 1
        if len(self.longest) < LONGEST or tokens > self.longest[-1][0]:
            self.longest = sorted([*self.longest, (tokens, json.loads(line)["id"])], key=lambda row: -row[0])[:LONGEST]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the dataset's entry in report.json."""
        lengths = sorted(self.lengths)
        counts = [0] * len(EDGES)
        for length in lengths:
            counts[bisect_right(EDGES, length) - 1] += 1
        kept = sum(self.kept.values())
        return {
            "read": self.read,
            "kept": kept,
            "dropped": dict(sorted(self.dropped.items())),
            "broken": self.broken,
            **self.kept,
            "repeated": self.repeated,
            "duplicates": sum(self.dropped[reason] for reason in DUPLICATES),
            "truncated": self.truncated,
            "tokens": {
                "counted_by": self.counted_by,
                "total": sum(lengths),
                "mean": round(sum(lengths) / kept, 1) if kept else 0,
                **{f"p{percent}": lengths[(kept - 1) * percent // 100] if kept else 0 for percent in (50, 90, 99)},
                "max": lengths[-1] if kept else 0,
                "histogram": {"from": list(EDGES), "rows": counts},
            },
            "longest": [{"id": identity, "tokens": tokens} for tokens, identity in self.longest],
            "languages": {LANGUAGES[number]: round(count / kept, 4) for number, count in self.languages.most_common()},
            "dropped_rows": self.dropped_rows,
        }
