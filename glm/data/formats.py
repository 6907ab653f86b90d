"""Raw files → rows of one shape per use, checked.

    sft     {"id", "messages": [{"role", "content"}, …, assistant]}
    reward  {"id", "prompt": [messages … user], "answers": [best, …, worst]}
    ppo     {"id", "prompt": [messages … user], "answer": reference or null}
    text    {"id", "text"}: what the embedded base model learns from

Accepted formats, told apart by their columns: the reference's alpaca rows with or without history (`output` a string,
or a list of ranked answers), `messages`/`conversations`, `prompt`/`completion`, `prompt`/`chosen`/`rejected`. `id` is
"<dataset>:<file>:<row>": a prediction can be traced to its line. Rows that bring the same `group` share a split.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from glm.data import reviews
from glm.data.registry import Entry
from glm.data.rows import Row, Use
from glm.errors import InputError

CONVERTERS: dict[str, Callable[[Path], list[Row]]] = {
    "reviews_text": reviews.text_rows,
    "reviews_sft": reviews.sft_rows,
    "reviews_pairs": reviews.pair_rows,
    "reviews_prompts": reviews.prompt_rows,
}
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}


def read_rows(name: str, entry: Entry, folder: Path, use: Use) -> Iterator[tuple[str, Row | None, str]]:
    """Yield (id, row, why) for every raw row of a fetched dataset: a row in the shape of `use`, or None and the reason.

    Raises:
        InputError: a file cannot be parsed; names file and line.
    """
    if entry.format is not None and entry.format not in CONVERTERS:
        raise InputError(f"dataset {name!r}: unknown format {entry.format!r}; known: {', '.join(sorted(CONVERTERS))}")
    sources: list[tuple[str, Iterable[tuple[int, Any]]]]
    if entry.format is not None:
        sources = [(entry.format, enumerate(CONVERTERS[entry.format](folder), start=1))]
    else:
        sources = [(path.name, _parse(path)) for path in sorted(folder.iterdir())]
    for source, raw_rows in sources:
        for number, raw in raw_rows:
            identity = f"{name}:{source}:{number}"
            try:
                group = {"group": raw["group"]} if isinstance(raw, dict) and isinstance(raw.get("group"), str) else {}
                yield identity, {"id": identity, **_convert(raw, entry.columns, use), **group}, ""
            except _UnusableError as fault:
                yield identity, None, str(fault)


class _UnusableError(Exception):
    """A row that cannot serve; the text is the reason that the report counts."""


def _parse(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a json, jsonl, csv or parquet file with their numbers (line numbers where the format has lines)."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(file), start=2)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise InputError(f"{path.name}, line {number}: not valid JSON: {error.msg}") from None
        elif path.suffix == ".json":
            try:
                rows = json.load(file)
            except json.JSONDecodeError as error:
                raise InputError(f"{path.name}, line {error.lineno}: not valid JSON: {error.msg}") from None
            if not isinstance(rows, list):
                raise InputError(f"{path.name}: expected a list of rows, found {type(rows).__name__}")
            yield from enumerate(rows, start=1)
        else:
            raise InputError(f"{path.name}: rows are read from json, jsonl, csv or parquet; a .txt file needs a format")


def _convert(raw: Any, columns: dict[str, str | None] | None, use: Use) -> Row:
    if not isinstance(raw, dict):
        raise _UnusableError(f"row is {type(raw).__name__}, not an object")
    if use == "text":
        return {"text": _text(raw.get("text"), "text")}
    messages, given = _dialogue(raw, columns)
    if not messages or messages[-1]["role"] != "user":
        raise _UnusableError("no question before the answer")
    if any(not message["content"].strip() for message in messages):
        raise _UnusableError("empty question")
    answers = [answer for answer in given if answer is not None]
    if any(not answer.strip() for answer in answers):
        raise _UnusableError("empty answer")
    if use == "reward":
        if len(answers) < 2:
            raise _UnusableError("fewer than two ranked answers")
        if len(set(answers)) < len(answers):
            raise _UnusableError("ranked answers are equal")
        return {"prompt": messages, "answers": answers}
    if use == "sft":
        if not answers:
            raise _UnusableError("no answer")
        return {"messages": [*messages, {"role": "assistant", "content": answers[0]}]}
    return {"prompt": messages, "answer": answers[0] if answers else None}


def _dialogue(raw: Row, columns: dict[str, str | None] | None) -> tuple[list[dict[str, str]], list[str | None]]:
    """The messages before the answer, and the answers, best first."""
    for key in ("messages", "conversations"):
        if key in raw and columns is None:
            messages = [_message(message) for message in _list(raw[key], key)]
            if messages and messages[-1]["role"] == "assistant":
                return messages[:-1], [messages[-1]["content"]]
            return messages, []
    if columns is None and {"chosen", "rejected"} <= raw.keys():
        chosen, rejected = raw["chosen"], raw["rejected"]
        if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
            turns = [_message(message) for message in chosen]
            return turns[:-1], [turns[-1]["content"], _message(rejected[-1])["content"]]
        return _prompt(raw.get("prompt")), [_text(chosen, "chosen"), _text(rejected, "rejected")]
    if columns is None and "prompt" in raw and "instruction" not in raw:
        answer = raw.get("completion")
        return _prompt(raw["prompt"]), [None if answer is None else _text(answer, "completion")]
    # The reference's rule: with `columns` given, a role that it does not name has no column.
    names = {role: (COLUMNS.get(role) if columns is None else columns.get(role)) for role in (*COLUMNS, "history")}
    if columns is None and "history" in raw:
        names["history"] = "history"
    question = _field(raw, names["prompt"]) + _field(raw, names["query"])
    messages = []
    for turn in _list(raw.get(names["history"]) or [], "history") if names["history"] else []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise _UnusableError("history is not a list of [question, answer] pairs")
        messages += [
            {"role": "user", "content": _text(turn[0], "history")},
            {"role": "assistant", "content": _text(turn[1], "history")},
        ]
    messages.append({"role": "user", "content": question})
    answer = raw.get(names["response"]) if names["response"] else None
    answers = answer if isinstance(answer, list) else [answer]
    return messages, [None if text is None else _text(text, "response") for text in answers]


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _UnusableError("a message is not an object")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role not in ROLES:
        raise _UnusableError(f"unknown role {role!r}")
    return {"role": ROLES[role], "content": _text(content, "content")}


def _prompt(value: Any) -> list[dict[str, str]]:
    if isinstance(value, list):
        return [_message(message) for message in value]
    return [{"role": "user", "content": _text(value, "prompt")}]


def _field(raw: Row, name: str | None) -> str:
    value = raw.get(name) if name else None
    return "" if value is None else _text(value, str(name))


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _UnusableError(f"{name} is {type(value).__name__}, not a list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _UnusableError(f"{name} is {type(value).__name__}, not text")
    return value
