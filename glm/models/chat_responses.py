"""From a generated text to what the user sees, as the `process_response` of each generation's authors does it."""

import ast
import re
from typing import Any

from glm.errors import InputError

_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_BESIDE_CHINESE = re.compile(
    f"(?<=[\u4e00-\u9fff])[{''.join(_FULL_WIDTH)}]|[{''.join(_FULL_WIDTH)}](?=[\u4e00-\u9fff])"
)


def chatglm2_response(text: str) -> str:
    """ChatGLM2-6B: without surrounding blanks, and with the year for the models' placeholder of it."""
    return text.strip().replace("[[训练时间]]", "2023年")


def chatglm1_response(text: str) -> str:
    """ChatGLM-6B: also with full-width punctuation beside Chinese characters (its tokenizer knows only half-width)."""
    return _BESIDE_CHINESE.sub(lambda found: _FULL_WIDTH[found[0]], chatglm2_response(text))


def chatglm3_messages(text: str) -> list[dict[str, str]]:
    """ChatGLM3-6B and GLM-4: the assistant messages in a text decoded with its role tokens.

    Each starts with a line of metadata: empty for an answer, the tool's name for a tool call. The first line of the
    first message follows the prompt's `<|assistant|>`.
    """
    messages = []
    for part in text.split("<|assistant|>"):
        metadata, newline, content = part.partition("\n")
        if not newline:
            metadata, content = "", part
        content = content if metadata.strip() else content.strip()
        messages.append({"role": "assistant", "metadata": metadata, "content": content})
    return messages


def chatglm3_tool_call(message: dict[str, str]) -> dict[str, Any]:
    """Name and arguments of a ChatGLM3 tool call, a message with content ```python tool_call(name=value, ...)```.

    The arguments are read as literals; nothing is run.

    Raises:
        InputError: the content is not such a call.
    """
    code = "\n".join(message["content"].strip().split("\n")[1:-1])
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or None in [keyword.arg for keyword in call.keywords]:
            raise ValueError("not a call with named arguments")
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise InputError(f"not a tool call: {message['content'][:80]!r} ({error})") from error
    return {"name": message["metadata"].strip(), "parameters": arguments}
