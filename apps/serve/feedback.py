"""What people think of answers, as rows that training takes: data/feedback/labels.jsonl, pairs.jsonl, rankings.jsonl.

The folder is the dataset `feedback` of data/dataset_info.json, for data.kto (labels) and data.reward (the others).
"""

import fcntl
import json
import os
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from apps.serve.schema import Feedback
from glm.errors import InputError

REMEMBERED = 2000  # answers that can still be spoken about


class Answered(NamedTuple):
    """A question with its answers, until nobody can be expected to speak about it."""

    messages: list[dict[str, Any]]
    answers: list[str]


class FeedbackStore:
    """Remembers the last answers, and appends what is said about them to the files of `folder`."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder, version
        self._answered: OrderedDict[str, Answered] = OrderedDict()

    def remember(self, answer_id: str, messages: list[dict[str, Any]], answers: list[str]) -> None:
        """Keep an answer in memory, for what may be said about it."""
        self._answered[answer_id] = Answered(messages, answers)
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    def add(self, feedback: Feedback) -> Path:
        """Append one row, in one write under a lock; returns the file.

        Raises:
            InputError: the answer is not known (any more), or has no such choice.
        """
        known = self._answered.get(feedback.id)
        if known is None:
            raise InputError(f"id: no answer {feedback.id!a} among the last {REMEMBERED} of this server")
        row: dict[str, Any] = {"prompt": known.messages}
        if feedback.label is not None:
            name = "labels.jsonl"
            row |= {"completion": self._text(known, feedback.index), "label": feedback.label}
        elif feedback.ranking is not None:
            name = "rankings.jsonl"
            row["completion"] = [self._text(known, index) for index in feedback.ranking]
            if len(set(row["completion"])) < len(row["completion"]):
                raise InputError("ranking: two of its answers are the same text: leave one out")
        else:
            name = "pairs.jsonl"
            if feedback.better is not None:
                row |= {"chosen": feedback.better, "rejected": self._text(known, feedback.index)}
            else:
                row |= {
                    "chosen": self._text(known, feedback.chosen or 0),
                    "rejected": self._text(known, feedback.rejected or 0),
                }
            if row["chosen"] == row["rejected"]:
                raise InputError("chosen and rejected are the same text: there is nothing to learn from it")
        row |= {
            "id": feedback.id,
            "model_version": self.version,
            "comment": feedback.comment,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return append_row(self.folder / name, row)

    def _text(self, known: Answered, index: int) -> str:
        if index >= len(known.answers):
            raise InputError(f"choice {index}: that answer has {len(known.answers)} choices, counted from 0")
        return known.answers[index]


def append_row(path: Path, row: dict[str, Any]) -> Path:
    """Append a JSON line in one write; writers of other processes wait for each other."""
    line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
    return path
