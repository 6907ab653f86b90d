"""Rows of datasets that say in running text who speaks → rows with instruction, output and history.

The reference served four of these by loading scripts that `datasets` no longer runs; its rules are kept.
"""

import re
from collections.abc import Callable
from typing import Any

from glm.data.contract import UnusableError
from glm.data.rows import Row

Turn = list[str]  # [question, answer]


def hh_rlhf(raw: Row) -> Row:
    """Anthropic's HH-RLHF: `chosen` and `rejected` are whole dialogues that part at the last answer."""
    chosen = _turns(_text(raw, "chosen"), "\n\nHuman: ", "\n\nAssistant: ")
    rejected = _text(raw, "rejected").rpartition("\n\nAssistant: ")[2].strip()
    *history, (question, answer) = chosen
    return {"instruction": question, "output": [answer, rejected], "history": history}


def belle_multiturn(raw: Row) -> Row:
    """BELLE's multi-turn chats: `instruction` holds all turns up to a last, open "Assistant:"; `output` the answer."""
    *history, (question, _) = _turns(_text(raw, "instruction"), "Human:", "Assistant:")
    return {"instruction": question, "output": _text(raw, "output").strip(), "history": history}


def ultra_chat(raw: Row) -> Row:
    """UltraChat: `data` lists the turns, user first; a last question without an answer is left out."""
    turns = raw.get("data")
    if not isinstance(turns, list):
        raise UnusableError("data is not a list of turns")
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise UnusableError("fewer than two turns")
    pairs = [turns[at : at + 2] for at in range(0, len(turns), 2)]
    return {"instruction": pairs[-1][0], "output": pairs[-1][1], "history": pairs[:-1]}


def baize(raw: Row) -> Row:
    """Baize's self-chats: one text with [|Human|] and [|AI|] before each turn, often closed by an empty [|Human|]."""
    text = _text(raw, "chat_sample" if "chat_sample" in raw else "input")
    start = text.find("[|Human|]")
    pieces = re.split(r"\[\|(Human|AI)\|\]", text[start:])[1:] if start >= 0 else []
    turns = [(who, said.strip()) for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    while turns and (turns[-1][0] == "Human" or not turns[-1][1]):
        turns.pop()
    if not turns or any(who != ("Human", "AI")[at % 2] for at, (who, _) in enumerate(turns)):
        raise UnusableError("[|Human|] and [|AI|] do not alternate")
    pairs = [[turns[at][1], turns[at + 1][1]] for at in range(0, len(turns), 2)]
    return {"instruction": pairs[-1][0], "output": pairs[-1][1], "history": pairs[:-1]}


def as_it_is(raw: Row) -> Row:
    """Rows that have their columns already."""
    return raw


# By the value of `format`, or by the folder that `script_url` names.
CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "hh_rlhf_en": hh_rlhf,
    "belle_multiturn": belle_multiturn,
    "ultra_chat": ultra_chat,
    "example_dataset": as_it_is,
    "baize": baize,
}
TOLERANT = {"ultra_chat"}  # the published files hold lines that are no JSON: dropped and counted, not a reason to stop


def _turns(text: str, human: str, assistant: str) -> list[Turn]:
    """[question, answer] pairs of a dialogue, found from its end backwards; text before the first is left out."""
    turns: list[Turn] = []
    rest = text
    while (answer_at := rest.rfind(assistant)) >= 0:
        question_at = rest.rfind(human)
        if question_at < 0:
            break
        if question_at > answer_at or assistant in rest[question_at:answer_at]:
            raise UnusableError(f"{human.strip()} and {assistant.strip()} do not alternate")
        question = rest[question_at + len(human) : answer_at].strip()
        turns.insert(0, [question, rest[answer_at + len(assistant) :].strip()])
        rest = rest[:question_at]
    if not turns:
        raise UnusableError(f"no {human.strip()} before {assistant.strip()}")
    return turns


def _text(raw: Row, name: str) -> str:
    value: Any = raw.get(name)
    if not isinstance(value, str):
        raise UnusableError(f"{name} is {type(value).__name__}, not text")
    return value
