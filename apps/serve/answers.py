"""From the engine's events to OpenAI's answers and chunks."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm.serving.answer import AnswerReader
from glm.serving.request import Event, Request, RequestQueue
from glm.serving.sampling import Chosen, SamplingParams

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class EngineError(RuntimeError):
    """The engine could not finish an answer."""


@dataclass
class Choice:
    """One of the answers to a question, as far as it has come."""

    request: Request
    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    finish_reason: str = ""

    def take(self, event: Event) -> None:
        self.text += event.text
        self.chosen += event.chosen
        if event.finish_reason == "error":
            raise EngineError(event.error)
        if event.finish_reason:
            called = event.finish_reason == "stop" and self.request.reader.tool_calls
            self.finish_reason = "tool_calls" if called else event.finish_reason


class Asked:
    """A question with all its choices on the way; `id` is the answer's, `model` what the client asked for."""

    def __init__(self, kind: str, model: str, lora: str) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.model, self.lora = model, lora
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def add(self, prompt: list[int], params: SamplingParams, reader: AnswerReader, stream: bool) -> None:
        """One more choice. It is asked for by `submit`."""
        index = len(self.choices)

        def deliver(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.choices.append(Choice(Request(prompt, params, reader, deliver, stream, self.lora)))

    def submit(self, engine: RequestQueue) -> None:
        """Ask for all choices (see `RequestQueue.submit` for what is raised)."""
        engine.submit(*[choice.request for choice in self.choices])

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What comes in, with the choice's number, until all have ended; leaving early cancels the rest.

        Raises:
            EngineError: a choice failed.
        """
        try:
            while not all(choice.finish_reason for choice in self.choices):
                index, event = await self._events.get()
                self.choices[index].take(event)
                yield index, event
        finally:
            for choice in self.choices:
                choice.request.cancel()

    def usage(self) -> dict[str, int]:
        """Tokens read and written; a prompt with several choices counts once."""
        prompts = {id(choice.request.prompt): len(choice.request.prompt) for choice in self.choices}
        written = sum(choice.request.completion_tokens for choice in self.choices)
        read = sum(prompts.values())
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def chat_message(choice: Choice) -> dict[str, Any]:
    """The assistant's message."""
    calls = tool_calls(choice)
    message: dict[str, Any] = {"role": "assistant", "content": choice.text if choice.text or not calls else None}
    return message | ({"tool_calls": calls} if calls else {})


def tool_calls(choice: Choice) -> list[dict[str, Any]]:
    """The calls of an ended choice."""
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in choice.request.reader.tool_calls
    ]


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, chosen: list[Chosen]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, data = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.alternatives]}
            for one in chosen
        ]
    }


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, chosen: list[Chosen], offset: int, as_ids: bool = False
) -> dict[str, Any]:
    """OpenAI's older `logprobs`; `offset` is where in the text the first token stands. `as_ids` names tokens by id."""

    def name(token: int) -> str:
        return f"token_id:{token}" if as_ids else token_text(tokenizer, token)[0]

    texts = [name(one.token) for one in chosen]
    likely = [{name(token): value for token, value in one.alternatives} for one in chosen]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in chosen],
        "top_logprobs": likely,
        "text_offset": [offset + sum(map(len, texts[:place])) for place in range(len(texts))],
    }


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, bytes]:
    """(text, bytes) of a single token; part of a character has bytes alone."""
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if byte := _BYTE.fullmatch(piece):
        return f"\\x{byte[1].lower()}", bytes.fromhex(byte[1])
    text = tokenizer.decode([token])
    if piece.startswith("▁") and not text.startswith(" "):  # decoders drop the first blank
        text = " " + text
    return text, text.encode("utf-8", errors="replace")


def sse(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
