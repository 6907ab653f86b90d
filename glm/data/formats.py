"""Raw rows of every accepted format → rows in the shape of one use (glm.data.contract).

A row's columns say what it is:

    instruction, input?, output?, history?, system?     the reference's alpaca rows; `output`: a text, or a ranking
    messages or conversations, system?                  dialogues, {"role", "content"} or {"from", "value"}
    prompt, completion?                                 a text or messages each; a list of texts is a ranking
    chosen, rejected, and any of the prompts above      a pair; as messages, they may bring their prompt along
    any of these with label: true or false              an answer that was called good or bad (KTO)
    text                                                plain text; as a prompt for PPO

A column whose value is null counts as absent.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from typing import Any

from glm.data.contract import UnusableError
from glm.data.rows import Row, Use

ROLES = {
    "system": "system",
    "developer": "system",
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


def to_use(raw: Row, columns: Columns, use: Use) -> Row:
    """A raw row in the shape of `use`, not validated yet."""
    if use == "text":
        name = (columns or {}).get("text") or "text"
        if name not in raw:
            raise UnusableError(f"no text: no column {name!r} among {names_of(raw)}")
        return {"text": _text(raw[name], name)}
    messages, answers = _dialogue(raw, columns)
    label = _label(raw.get((columns or {}).get("label") or "label"), asked=use == "kto")
    if use == "reward":
        if not answers:
            raise UnusableError(f"no ranked answers among {names_of(raw)}")
        return {"prompt": messages, "answers": answers}
    if use == "kto":
        if not answers:
            raise UnusableError(_no_answer(raw, columns))
        return {"prompt": messages, "answer": answers[0], "label": label}
    if use == "sft":
        if not messages:
            raise UnusableError("no question before the answer")
        if not answers:
            raise UnusableError(_no_answer(raw, columns) if messages[-1]["content"].strip() else "empty question")
        if label is False:
            raise UnusableError("the answer is labelled bad")
        return {"messages": [*messages, {"role": "assistant", "content": answers[0]}]}
    is_reference = label is not False and answers and answers[0].strip()
    return {"prompt": messages, "answer": answers[0] if is_reference else None}


def _dialogue(raw: Row, columns: Columns) -> tuple[Messages, list[str]]:
    """The messages before the answer, and the answers, best first."""
    messages, answers = _prompt_and_answers(raw, columns)
    names = columns or {}
    chosen, rejected = names.get("chosen") or "chosen", names.get("rejected") or "rejected"
    if raw.get(chosen) is not None and raw.get(rejected) is not None:
        before, best = _answer(raw[chosen], "chosen")
        before_worst, worst = _answer(raw[rejected], "rejected")
        if before != before_worst:
            raise UnusableError("chosen and rejected answer different dialogues")
        answers = [best, worst]
        messages = before if before[: len(messages)] == messages and before else messages + before
    return messages, answers


def _prompt_and_answers(raw: Row, columns: Columns) -> tuple[Messages, list[str]]:
    names = columns or {}
    given = {name for name, value in raw.items() if value is not None}
    # The reference's rule: with `columns` given, a role that it does not name has no column.
    system = raw.get(names.get("system") or "system") if columns is None or "system" in names else None
    key = names.get("messages") or next((key for key in ("messages", "conversations") if key in given), None)
    if key and (columns is None or "messages" in names):
        if any(raw.get(name) not in (None, "", "[]", []) for name in ("tools", "functions")):
            raise UnusableError("the dialogue offers tools, which is not trained here")
        messages = _messages(_list(raw.get(key), key), key, system)
        if messages and messages[-1]["role"] == "assistant":
            return messages[:-1], [messages[-1]["content"]]
        return messages, []
    if columns is None and "instruction" not in given:
        if "prompt" in given:
            return _messages(raw["prompt"], "prompt", system), _answers(raw, "completion")
        if "text" in given:
            return _messages(raw["text"], "text", system), []
        if {"chosen", "rejected"} <= given:
            return [], []
    column = COLUMNS if columns is None else columns
    asked = [name for name in (column.get("prompt"), column.get("query")) if name]
    if not asked and {"chosen", "rejected"} <= names.keys():
        return [], []
    if not any(name in raw for name in asked):
        known = asked if columns is not None else [*asked, "prompt", "messages", "conversations"]
        raise UnusableError(f"no question: no column {' or '.join(map(repr, known))} among {names_of(raw)}")
    messages = [{"role": "system", "content": _text(system, "system")}] if system else []
    history = column.get("history")
    for turn in _list(raw.get(history) or [], "history") if history else []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UnusableError("history is not a list of [question, answer] pairs")
        messages.append({"role": "user", "content": _text(turn[0], "history")})
        messages.append({"role": "assistant", "content": _text(turn[1], "history")})
    question = _field(raw, column.get("prompt")) + _field(raw, column.get("query"))
    messages.append({"role": "user", "content": question})
    return messages, _answers(raw, column.get("response"))


def _answers(raw: Row, name: str | None) -> list[str]:
    """An answer, a ranking of them, or the messages that hold one; empty for none."""
    value = raw.get(name) if name else None
    if value is None:
        return []
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_answer(value, str(name))[1]]
    return [_text(item, str(name)) for item in value] if isinstance(value, list) else [_text(value, str(name))]


def _no_answer(raw: Row, columns: Columns) -> str:
    """Why a row has no answer: the column may be empty there, or not exist."""
    beside = {"instruction": "output", "prompt": "completion"}
    names = [columns.get("response")] if columns is not None else [beside[ask] for ask in beside if ask in raw][:1]
    if missing := [name for name in names if name and name not in raw]:
        return f"no answer: no column {missing[0]!r} among {names_of(raw)}"
    return "no answer"


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
    """A dialogue, or a text that asks, with the row's own system prompt before it."""
    messages = (
        [_message(message) for message in value]
        if isinstance(value, list)
        else [{"role": "user", "content": _text(value, name)}]
    )
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    return messages


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UnusableError("a message is not an object")
    role = message.get("role") or message.get("from")
    content = message["value"] if message.get("content") is None and "value" in message else message.get("content")
    if not isinstance(role, str):
        raise UnusableError(f"role is {kind_of(role)}, not text")
    if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise UnusableError("the dialogue calls tools, which is not trained here")
    if role not in ROLES:
        raise UnusableError(f"unknown role {str(role)[:20]!r}; known: {', '.join(ROLES)}")
    if message.get("weight") == 0:
        raise UnusableError("a message has weight 0, which is not supported: every answer is trained on")
    if isinstance(content, list):  # OpenAI's content parts
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise UnusableError("a message holds something else than text")
        content = "".join(_text(part.get("text"), "content") for part in content)
    return {"role": ROLES[role], "content": _text(content, "content")}


def from_csv(raw: Row, columns: Columns, use: Use) -> Row:
    """CSV knows text only: lists are read from their JSON or Python spelling, and an empty cell is null."""
    roles = ["history", "messages", "chosen", "rejected", *(["response"] if use == "reward" else [])]
    if columns is None:
        nested = {"history", "messages", "conversations", "chosen", "rejected", "prompt"}
        if use == "reward":  # elsewhere an answer that looks like a list is an answer
            nested |= {"output", "completion"}
    else:
        nested = {str(columns[role]) for role in roles if columns.get(role)}
    return {
        name: _literal(text) if text.startswith(("[", "{")) and name in nested else text or None
        for name, text in raw.items()
    }


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
        raise UnusableError(f"{name} is {kind_of(value)}, not a list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UnusableError(f"{name} is {kind_of(value)}, not text")
    return value


def kind_of(value: Any) -> str:
    """What a value of a wrong type is."""
    return "null" if value is None else type(value).__name__


def names_of(columns: Iterable[str]) -> str:
    """Names of columns for a message, not too many of them."""
    found = sorted(map(repr, columns))
    return ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
