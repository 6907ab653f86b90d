"""Raw rows of every accepted format → rows in the shape of one use (glm.data.contract).

A row's columns say what it is:

    instruction, input?, output?, history?, system?     the reference's alpaca rows; `output`: a text, or a ranking
    messages or conversations                           dialogues, {"role", "content"} or {"from", "value"}
    prompt, completion?                                 a text or messages each; a list of texts is a ranking
    chosen, rejected, and any of the prompts above      a pair; as messages, they may bring their prompt along
    any of these with label: true or false              an answer that was called good or bad (KTO)
    text                                                plain text; as a prompt for PPO

`id` is "<dataset>:<file>:<row>", so that a prediction can be traced to the line it came from. Rows to which a converter
gives the same `group` share a split.
"""

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from glm.data import reviews
from glm.data.contract import UnusableError, validate
from glm.data.converters import CONVERTERS, TOLERANT
from glm.data.readers import Raw, extension, read_file
from glm.data.registry import Entry
from glm.data.rows import Row, Use
from glm.errors import InputError

FOLDER_FORMATS: dict[str, Callable[[Path], list[Row]]] = {
    "reviews_text": reviews.text_rows,
    "reviews_sft": reviews.sft_rows,
    "reviews_pairs": reviews.pair_rows,
    "reviews_prompts": reviews.prompt_rows,
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
Columns = Mapping[Any, str | None] | None
Messages = list[dict[str, str]]


class Read(NamedTuple):
    """What became of one raw row: its place, and a row in the shape of the use, or None and the reason."""

    id: str
    line: int | None
    row: Row | None
    reason: str = ""
    broken: bool = False
    """The file itself is at fault there: it does not parse."""


def read_rows(name: str, entry: Entry, folder: Path, use: Use) -> Iterator[Read]:
    """Yield what becomes of every raw row of a fetched dataset, in order.

    Raises:
        InputError: the entry's format is unknown.
    """
    if entry.format is not None and entry.format not in FOLDER_FORMATS | CONVERTERS:
        known = ", ".join(sorted(FOLDER_FORMATS | CONVERTERS))
        raise InputError(f"dataset {name!r}: unknown format {entry.format!r}; known: {known}")
    format_name = entry.format or PurePosixPath(entry.script_url or "").name
    sources: list[tuple[str, bool, Iterator[Raw]]]
    if format_name in FOLDER_FORMATS:
        rows = FOLDER_FORMATS[format_name](folder)
        sources = [(format_name, False, (Raw(at, None, row) for at, row in enumerate(rows, start=1)))]
    else:
        sources = [(path.name, extension(path) == ".csv", read_file(path)) for path in sorted(folder.iterdir())]
    convert = CONVERTERS.get(format_name)
    for source, is_csv, raws in sources:
        for number, line, value, fault in raws:
            identity = f"{name}:{source}:{number}"
            if fault:
                yield Read(identity, line, None, fault, broken=format_name not in TOLERANT)
                continue
            try:
                if not isinstance(value, dict):
                    raise UnusableError(f"row is {type(value).__name__}, not an object")
                if is_csv:
                    value = _from_csv(value, use)
                if convert:
                    value = convert(value)
                row = {"id": identity, **validate(use, _to_use(value, entry.columns, use))}
                # A file's own column of that name means something else.
                group = {"group": value["group"]} if format_name in FOLDER_FORMATS and "group" in value else {}
                yield Read(identity, line, row | group)
            except UnusableError as reason:
                yield Read(identity, line, None, str(reason))


def _to_use(raw: Row, columns: Columns, use: Use) -> Row:
    """A raw row in the shape of `use`, not validated yet."""
    if use == "text":
        return {"text": _text(raw.get((columns or {}).get("text") or "text"), "text")}
    messages, answers = _dialogue(raw, columns)
    label = _label(raw.get((columns or {}).get("label") or "label"), asked=use == "kto")
    if use == "reward":
        return {"prompt": messages, "answers": answers}
    if use == "kto":
        if not answers:
            raise UnusableError("no answer")
        return {"prompt": messages, "answer": answers[0], "label": label}
    if use == "sft":
        if not messages:
            raise UnusableError("no question before the answer")
        if not answers:
            raise UnusableError("empty question" if not messages[-1]["content"].strip() else "no answer")
        if label is False:
            raise UnusableError("the answer is labelled bad")
        return {"messages": [*messages, {"role": "assistant", "content": answers[0]}]}
    return {"prompt": messages, "answer": answers[0] if answers and answers[0].strip() else None}


def _dialogue(raw: Row, columns: Columns) -> tuple[Messages, list[str]]:
    """The messages before the answer, and the answers, best first."""
    messages, answers = _prompt_and_answers(raw, columns)
    names = columns or {}
    chosen, rejected = names.get("chosen") or "chosen", names.get("rejected") or "rejected"
    if {chosen, rejected} <= raw.keys():
        before, best = _answer(raw[chosen], "chosen")
        before_worst, worst = _answer(raw[rejected], "rejected")
        if before != before_worst:
            raise UnusableError("chosen and rejected answer different dialogues")
        answers = [best, worst]
        messages = before if before[: len(messages)] == messages and before else messages + before
    return messages, answers


def _prompt_and_answers(raw: Row, columns: Columns) -> tuple[Messages, list[str]]:
    names = columns or {}
    key = names.get("messages") or next((key for key in ("messages", "conversations") if key in raw), None)
    if key and (columns is None or "messages" in names):
        messages = [_message(message) for message in _list(raw.get(key), key)]
        if messages and messages[-1]["role"] == "assistant":
            return messages[:-1], [messages[-1]["content"]]
        return messages, []
    if columns is None and "prompt" in raw and "instruction" not in raw:
        return _messages(raw["prompt"], "prompt", raw.get("system")), _answers(raw.get("completion"), "completion")
    if columns is None and "instruction" not in raw and "text" in raw:
        return _messages(raw["text"], "text", None), []
    if columns is None and "instruction" not in raw and {"chosen", "rejected"} <= raw.keys():
        return [], []
    # The reference's rule: with `columns` given, a role that it does not name has no column.
    column = COLUMNS if columns is None else columns
    system = _field(raw, column.get("system"))
    messages = [{"role": "system", "content": system}] if system else []
    history = column.get("history")
    for turn in _list(raw.get(history) or [], "history") if history else []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UnusableError("history is not a list of [question, answer] pairs")
        messages.append({"role": "user", "content": _text(turn[0], "history")})
        messages.append({"role": "assistant", "content": _text(turn[1], "history")})
    question = _field(raw, column.get("prompt")) + _field(raw, column.get("query"))
    messages.append({"role": "user", "content": question})
    response = column.get("response")
    return messages, _answers(raw.get(response) if response else None, "response")


def _answers(value: Any, name: str) -> list[str]:
    """An answer, a ranking of them, or the messages that hold one; empty for none."""
    if value is None:
        return []
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_answer(value, name)[1]]
    return [_text(item, name) for item in value] if isinstance(value, list) else [_text(value, name)]


def _answer(value: Any, name: str) -> tuple[Messages, str]:
    """(messages before it, text) of an answer given as a text, a message, or a dialogue that ends with it."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [], _text(value, name)
    messages = [_message(message) for message in value]
    if not messages or messages[-1]["role"] != "assistant":
        raise UnusableError(f"{name} does not end with an answer")
    return messages[:-1], messages[-1]["content"]


def _messages(value: Any, name: str, system: Any) -> Messages:
    if isinstance(value, list):
        return [_message(message) for message in value]
    opening = [{"role": "system", "content": _text(system, "system")}] if system else []
    return [*opening, {"role": "user", "content": _text(value, name)}]


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UnusableError("a message is not an object")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise UnusableError("the dialogue calls tools, which is not trained here")
    if role not in ROLES:
        raise UnusableError(f"unknown role {role!r}")
    if isinstance(content, list):  # OpenAI's content parts
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise UnusableError("a message holds something else than text")
        content = "".join(_text(part.get("text"), "content") for part in content)
    return {"role": ROLES[role], "content": _text(content, "content")}


def _from_csv(raw: Row, use: Use) -> Row:
    """CSV knows text only: lists are read from their JSON or Python spelling, and an empty cell is no value."""
    nested = {"history", "messages", "conversations", "chosen", "rejected", "prompt"}
    if use == "reward":  # elsewhere an answer that looks like a list is an answer
        nested |= {"output", "completion", "response"}
    out: Row = {}
    for name, text in raw.items():
        if text == "" and name not in ("instruction", "prompt", "output"):
            continue
        out[name] = _literal(text) if text.startswith(("[", "{")) and name in nested else text
    return out


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
    return text


def _label(value: Any, asked: bool) -> bool | None:
    """True or false; where it is not asked for, a `label` of another kind (a class, say) is none."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool):
        return value
    if not asked:
        return None
    if value in (0, 1, "0", "1"):
        return value in (1, "1")
    raise UnusableError("no label" if value is None else "label is neither true nor false")


def _field(raw: Row, name: str | None) -> str:
    value = raw.get(name) if name else None
    return "" if value is None else _text(value, str(name))


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UnusableError(f"{name} is {type(value).__name__}, not a list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UnusableError(f"{name} is {type(value).__name__}, not text")
    return value
