"""Requests on their way to answers, and the queue in which they wait for an engine: what a server sees of one.

An engine is a `RequestQueue` that answers: `glm.serving.engine` with a model in this process, `glm.serving.remote` with
one behind HTTP. It hands each token to `_take`, so that ends, stop texts, counts and events are the same.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from glm.data.encode import end_id
from glm.errors import InputError
from glm.serving.answer import AnswerReader
from glm.serving.sampling import Chosen, SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]
DEFAULT_LENGTH = 2048
ROLE_ENDS = ("<|user|>", "<|observation|>")  # with which ChatGLM3 and GLM-4 end an answer, beside the end token


class QueueFullError(RuntimeError):
    """As many requests wait as are allowed to."""


class Event(NamedTuple):
    """What is new of an answer."""

    text: str
    chosen: list[Chosen]
    finish_reason: FinishReason | None = None
    error: str = ""


@dataclass(eq=False)
class Request:
    """A prompt on its way to an answer.

    `deliver` is called in the engine's thread, for each token if `stream`, else once at the end; it must be quick.
    """

    prompt: list[int]
    params: SamplingParams
    reader: AnswerReader
    deliver: Callable[[Event], None]
    stream: bool = True
    lora: str = ""  # name of a LoRA on the model; "": none
    cancelled: bool = False  # set by whoever no longer wants the answer
    last_token: int = 0
    ended_by: int | None = None  # the token that ended the answer, where one did
    completion_tokens: int = 0  # the end token counts
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    finished: float | None = None
    _pending: list[Chosen] = field(default_factory=list)
    _text: str = ""

    def __post_init__(self) -> None:
        self.random = random.Random(self.params.seed)

    def cancel(self) -> None:
        """Want no more of it: its slot is free at the next token. Safe in every thread."""
        self.cancelled = True


class RequestQueue:
    """Requests that wait and those that are answered.

    Args:
        ends: the tokens that end an answer.
        max_batch: requests answered at once.
        max_length: tokens of prompt and answer together.
        max_waiting: requests that may wait for a place.
    """

    how = ""  # requests are answered, for people

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ends: frozenset[int],
        vocab_size: int,
        max_batch: int,
        max_length: int,
        max_waiting: int,
    ) -> None:
        self.tokenizer, self.ends, self.vocab_size = tokenizer, ends, vocab_size
        self.max_batch, self.max_length, self.max_waiting = max_batch, max_length, max_waiting
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._wake = threading.Condition()
        self._stopping = False

    def lora_names(self) -> list[str]:
        """The LoRAs that requests may name."""
        return []

    def check(self, prompt: list[int]) -> None:
        """Raise InputError for a prompt that leaves no room for an answer."""
        if not 0 < len(prompt) < self.max_length:
            raise InputError(f"the prompt has {len(prompt)} tokens; this server takes 1 to {self.max_length - 1}")

    def submit(self, *requests: Request) -> None:
        """Let requests wait for their places, all or none of them.

        Raises:
            InputError: a prompt that leaves no room for an answer.
            QueueFullError: there are too many already.
        """
        for request in requests:
            self.check(request.prompt)
        with self._wake:
            if self._stopping:
                raise QueueFullError("the engine is shutting down")
            free = self.max_batch - len(self.running)
            if len(self.waiting) + len(requests) > max(free, 0) + self.max_waiting:
                raise QueueFullError(f"{len(self.running)} requests are answered and {len(self.waiting)} wait already")
            self.waiting.extend(requests)
            self._wake.notify(len(requests))

    def _take(self, request: Request, chosen: Chosen) -> None:
        """The next token of an answer."""
        request.last_token = chosen.token
        request.completion_tokens += 1
        request.first_token = request.first_token or time.monotonic()
        if chosen.token in self._ends_of(request):
            request.ended_by = chosen.token
            self._end(request, "stop")
            return
        request._pending.append(chosen)
        request._text += request.reader.add(chosen.token)
        if request.cancelled:
            self._end(request, "cancelled")
        elif request.reader.stopped:
            self._end(request, "stop")
        elif request.completion_tokens >= self._room(request):
            self._end(request, "length")
        elif request.stream and request._text:
            self._deliver(request)

    def _ends_of(self, request: Request) -> frozenset[int]:
        own = frozenset() if request.params.ignore_eos else self.ends
        return own.union(request.params.stop_token_ids)

    def _room(self, request: Request) -> int:
        return min(request.params.max_new_tokens, self.max_length - len(request.prompt))

    def _end(self, request: Request, reason: FinishReason, error: str = "") -> None:
        request.finished = time.monotonic()
        if reason != "error":
            request._text += request.reader.finish()
        self._deliver(request, reason, error)

    def _deliver(self, request: Request, reason: FinishReason | None = None, error: str = "") -> None:
        event = Event(request._text, request._pending, reason, error)
        request._text, request._pending = "", []
        try:
            request.deliver(event)
        except Exception:  # whoever asked is gone
            request.cancel()


def end_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, those of the generation config, ChatGLM3's and GLM-4's roles."""
    said = config.eos_token_id if config else None
    listed = [said] if isinstance(said, int) else said or []
    vocabulary = tokenizer.get_added_vocab()
    roles = [vocabulary[role] for role in ROLE_ENDS if role in vocabulary]
    return frozenset([end_id(tokenizer), *listed, *roles])
