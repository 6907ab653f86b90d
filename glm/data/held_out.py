"""Is what a model is tested on really new to it? Asked again where it is tested, of the files that are there."""

import json
from collections.abc import Iterator
from pathlib import Path

from glm.data.rows import Row, Use, question_of
from glm.data.text import normalise
from glm.errors import InputError


def check_disjoint(folder: str | Path, use: Use) -> None:
    """Compare the test rows of `use` with what was trained on: its own train and dev rows, and the base model's text.

    Questions count as equal if they differ in case, width, blanks or sentence punctuation only (as for the split); so
    do a test row's answer and a text that the embedded base model read.

    Raises:
        InputError: names how many test rows were trained on, and one of them.
    """
    folder = Path(folder)
    tested = list(_rows(folder / use / "test.jsonl"))
    for split in ("train", "dev"):
        questions = {_key(question_of(row)) for row in _rows(folder / use / f"{split}.jsonl")}
        _refuse(folder / use, split, tested, [row for row in tested if _key(question_of(row)) in questions])
    if use == "sft" and (folder / "text").is_dir():
        texts = {_key(row["text"]) for row in _rows(folder / "text" / "train.jsonl")}
        read = [row for row in tested if _key(row["messages"][-1]["content"]) in texts]
        _refuse(folder / use, "text that the base model read", tested, read)


def _refuse(folder: Path, where: str, tested: list[Row], seen: list[Row]) -> None:
    if seen:
        raise InputError(
            f"{folder}/test.jsonl: {len(seen)} of {len(tested)} held-out rows are in {where} too, such as "
            f"{seen[0]['id']!r} ({question_of(seen[0])[:60]!r}): a comparison on them would be worth nothing. "
            "`dvc repro -f preprocess` splits the data again"
        )


def _rows(path: Path) -> Iterator[Row]:
    if path.exists():  # dev may be empty
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def _key(text: str) -> int:
    return hash(normalise(text))  # 64 bits: a million rows take 60 MB, not 600
