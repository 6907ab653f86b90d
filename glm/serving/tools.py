"""Tools between OpenAI's spelling and the authors': ChatGLM3-6B writes a call as Python, GLM-4 as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from glm.errors import InputError
from glm.models.chat_responses import chatglm3_tool_call
from glm.models.chat_templates import CHATGLM3, GLM4

ToolFormat = Literal["chatglm3", "glm4"]


class ToolCall(NamedTuple):
    """A tool's name and its arguments, a JSON object as text."""

    name: str
    arguments: str


def tool_format(tokenizer: PreTrainedTokenizerBase) -> ToolFormat | None:
    """How the model behind this tokenizer calls tools; None for those whose prompt format has no place for them."""
    templates: dict[str, ToolFormat] = {CHATGLM3: "chatglm3", GLM4: "glm4"}
    template = tokenizer.chat_template
    return templates.get(template.strip()) if isinstance(template, str) else None


def read_call(form: ToolFormat, name: str, content: str) -> ToolCall | None:
    """A tool call from what the model wrote after the tool's name; None if it is none."""
    try:
        if form == "chatglm3":
            arguments = chatglm3_tool_call({"metadata": name, "content": content})["parameters"]
        else:
            arguments = json.loads(content)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    except (InputError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def template_messages(form: ToolFormat | None, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages as the chat templates take them: each tool call a message with the tool's name as metadata.

    Raises:
        InputError: a tool call or result for a model without tools, or arguments that are no JSON object.
    """
    out: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        calls = message.get("tool_calls") or []
        if form is None and (calls or message["role"] == "tool"):
            raise InputError(f"messages: message {number} is about a tool, for which this model has no prompt format")
        if message.get("content") or not calls:
            out.append({"role": message["role"], "content": message.get("content") or ""})
        for call in calls:
            name, arguments = call["function"]["name"], _arguments(number, call["function"]["arguments"])
            out.append({"role": "assistant", "metadata": name, "content": _written(form, arguments)})
    return out


def _arguments(number: int, text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(f"messages: message {number}: the arguments of a tool call must be a JSON object as text")
    return arguments


def _written(form: ToolFormat | None, arguments: dict[str, Any]) -> str:
    """Arguments as the model would have written them."""
    if form == "glm4":
        return json.dumps(arguments, ensure_ascii=False)
    named = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"```python\ntool_call({named})\n```"
