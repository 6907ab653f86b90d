"""Reading the rows that `glm.data.prepare` wrote; their shapes are described in glm.data.contract."""

from pathlib import Path
from typing import Any, Literal

from glm.files import read_jsonl

Use = Literal["text", "sft", "reward", "ppo", "kto"]
Row = dict[str, Any]

USES: tuple[Use, ...] = ("text", "sft", "reward", "ppo", "kto")
SPLITS = ("train", "dev", "test")


def read_split(folder: str | Path, use: Use, split: str) -> list[Row]:
    """The rows of one split."""
    return read_jsonl(Path(folder) / use / f"{split}.jsonl")


def spread(rows: list[Row], number: int) -> list[Row]:
    """At most `number` of the rows, every second, third … where there are so many: files are often sorted."""
    return rows[:: max(1, len(rows) // number)][:number]


def question_of(row: Row) -> str:
    """The first thing the user says (or the text); rows that share it share a split."""
    if "text" in row:
        return row["text"]
    messages = row["messages"] if "messages" in row else row["prompt"]
    return next(message["content"] for message in messages if message["role"] == "user")


def texts_of(row: Row) -> list[str]:
    """Everything that the row says, in order."""
    if "text" in row:
        return [row["text"]]
    said = [message["content"] for message in (row["messages"] if "messages" in row else row["prompt"])]
    answer = row.get("answer")
    return [*said, *row.get("answers", []), *([answer] if answer is not None else [])]
