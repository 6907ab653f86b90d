"""The shapes of prepared rows, checked before a tokenizer sees them.

    text    {"id", "text"}: what the embedded base model learns from
    sft     {"id", "messages": [system?, user, assistant, …, user, assistant]}
    reward  {"id", "prompt": [system?, user, …, user], "answers": [best, …, worst]}
    ppo     {"id", "prompt": […], "answer": reference or null}
    kto     {"id", "prompt": […], "answer", "label": true for a good answer}

A row that breaks the contract is dropped and counted under the reason that `validate` gives.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from glm.data.rows import Row, Use


class UnusableError(Exception):
    """A row that cannot serve; the text is the reason that the report counts."""


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text is not valid Unicode (half of a surrogate pair)") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class Message(TypedDict):
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: Text


EMPTY = {"system": "empty system prompt", "user": "empty question", "assistant": "empty answer"}


def _takes_turns(messages: list[Message]) -> list[Message]:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("no question before the answer")
    for turn, expected in zip(turns, ("user", "assistant") * (len(turns) // 2 + 1), strict=False):
        if turn["role"] != expected:
            raise ValueError(
                "no question before the answer" if turn is turns[0] else "user and assistant do not alternate"
            )
    for message in messages:
        if not message["content"].strip():
            raise ValueError(EMPTY[message["role"]])
    return messages


def _ends_with_question(messages: list[Message]) -> list[Message]:
    if messages[-1]["role"] != "user":
        raise ValueError("the prompt does not end with a question")
    return messages


def _ends_with_answer(messages: list[Message]) -> list[Message]:
    if messages[-1]["role"] != "assistant":
        raise ValueError("no answer")
    return messages


def _ranked(answers: list[str]) -> list[str]:
    if len(answers) < 2:
        raise ValueError("fewer than two ranked answers")
    if len(set(answers)) < len(answers):
        raise ValueError("ranked answers are equal")
    return answers


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("empty answer")
    return text


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("empty text")
    return text


Dialogue = Annotated[list[Message], AfterValidator(_takes_turns), AfterValidator(_ends_with_answer)]
Prompt = Annotated[list[Message], AfterValidator(_takes_turns), AfterValidator(_ends_with_question)]
Answer = Annotated[Text, AfterValidator(_not_empty)]


class TextRow(TypedDict):
    """Plain text."""

    text: Annotated[Text, AfterValidator(_some_text)]


class SftRow(TypedDict):
    """A dialogue whose answers are learnt."""

    messages: Dialogue


class RewardRow(TypedDict):
    """A question with two or more answers, best first."""

    prompt: Prompt
    answers: Annotated[list[Answer], AfterValidator(_ranked)]


class PpoRow(TypedDict):
    """A question to answer."""

    prompt: Prompt
    answer: Answer | None


class KtoRow(TypedDict):
    """An answer that was called good or bad."""

    prompt: Prompt
    answer: Answer
    label: bool


SHAPES: dict[Use, TypeAdapter[Any]] = {
    "text": TypeAdapter(TextRow),
    "sft": TypeAdapter(SftRow),
    "reward": TypeAdapter(RewardRow),
    "ppo": TypeAdapter(PpoRow),
    "kto": TypeAdapter(KtoRow),
}


def validate(use: Use, row: Row) -> Row:
    """Return `row` (without its id) if it keeps the contract of `use`.

    Raises:
        UnusableError: it does not; the text says which rule it breaks, without the row's own words.
    """
    try:
        return SHAPES[use].validate_python(row, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["type"] == "value_error":
            raise UnusableError(fault["msg"].removeprefix("Value error, ")) from None
        field = ".".join(str(part) for part in fault["loc"] if isinstance(part, str))
        raise UnusableError(f"{field}: {fault['msg'].removeprefix('Input ')}") from None
