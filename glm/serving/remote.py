"""An engine behind HTTP: vLLM, or another server of this project, in the place of `glm.serving.engine`.

    with RemoteEngine(tokenizer, "http://localhost:8000", config) as engine:
        engine.submit(request)

Prompts go out as token ids and answers come back as token ids, so that templates, stop texts, tools and counting are
this project's, whoever computes. The protocol is vLLM's `/v1/completions` (field names of 0.28: `prompt` as ids,
`stop_token_ids`, `return_token_ids`, `return_tokens_as_token_ids`, `top_k`; `max_model_len` of
`/v1/models`). Answers are always streamed: one that nobody wants any more is ended by closing its connection.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, Self

import httpx
from transformers import GenerationConfig, PreTrainedTokenizerBase

from glm.errors import InputError
from glm.generation.vllm_client import NO_DEFAULTS, RemoteError, check_status, open_client, served_model
from glm.serving.request import DEFAULT_LENGTH, Request, RequestQueue, end_ids
from glm.serving.sampling import Chosen

FAREWELL = 2.0  # seconds for requests under way, when this ends
TOKEN = "token_id:"  # how vLLM writes a token that is not to be text

log = logging.getLogger(__name__)


class RemoteEngine(RequestQueue):
    """Answers requests with the model of a server at `url`, which must be that of `tokenizer`.

    Args:
        config: generation config of the model: its end tokens count beside the tokenizer's.
        max_batch: requests sent at once; None for the others means as in `Engine`.
        max_length: tokens of prompt and answer together; None: 2048, or what the server takes if that is less.
        api_key: of that server.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        url: str,
        config: GenerationConfig | None = None,
        *,
        api_key: str | None = None,
        max_batch: int = 32,
        max_length: int | None = None,
        max_waiting: int = 256,
    ) -> None:
        """Raises InputError if no such server answers, or with another model's length."""
        self.client = open_client(url, api_key, max_batch)
        self.model = served_model(self.client)
        longest = self.model.get("max_model_len") or DEFAULT_LENGTH
        max_length = min(longest, DEFAULT_LENGTH) if max_length is None else max_length
        if max_length > longest:
            raise InputError(f"max_length: {max_length} tokens, but {url} takes {longest}")
        super().__init__(
            tokenizer,
            ends=end_ids(config, tokenizer),
            vocab_size=len(tokenizer),
            max_batch=max_batch,
            max_length=max_length,
            max_waiting=max_waiting,
        )
        self.how = f"by {url}"
        self._threads = [threading.Thread(target=self._run, name=f"remote-{n}", daemon=True) for n in range(max_batch)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
            left = [*self.running, *self.waiting]
            self.waiting.clear()
        for request in left:
            request.cancel()
        deadline = time.monotonic() + FAREWELL
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for request in left:
            if request.finished is None:
                self._end(request, "error", "the server is shutting down")
        self.client.close()

    def _run(self) -> None:
        """Answer one request after the other."""
        while (request := self._next()) is not None:
            try:
                if request.cancelled:
                    self._end(request, "cancelled")
                else:
                    self._answer(request)
            except Exception as error:  # that request fails, the engine goes on
                log.error("a request failed: %r", error)
                if request.finished is None:
                    self._end(request, "error", f"the engine behind this server: {str(error) or type(error).__name__}")
            finally:
                with self._wake:
                    self.running.remove(request)

    def _next(self) -> Request | None:
        """Wait for a request; None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self.waiting or self._stopping)
            if self._stopping:
                return None
            request = self.waiting.popleft()
            self.running.append(request)
            return request

    def _answer(self, request: Request) -> None:
        with self.client.stream("POST", "/v1/completions", json=self._body(request)) as response:
            check_status(response)
            for choice in choices(response):
                for chosen in read_tokens(choice, request.params.logprobs):
                    self._take(request, chosen)
                    if request.finished is not None:
                        return
                if choice.get("finish_reason") in ("stop", "length"):
                    self._end(request, choice["finish_reason"])
                    return
        raise RemoteError("the answer broke off")

    def _body(self, request: Request) -> dict[str, Any]:
        wishes = request.params
        body = {
            "model": self.model["id"],
            "prompt": request.prompt,
            "max_tokens": self._room(request),
            "temperature": wishes.temperature,
            "top_p": wishes.top_p,
            "stop_token_ids": sorted(self._ends_of(request)),
            "ignore_eos": wishes.ignore_eos,
            "stream": True,
            "return_token_ids": True,
        } | NO_DEFAULTS
        if wishes.top_k:
            body["top_k"] = wishes.top_k
        if wishes.seed is not None:
            body["seed"] = wishes.seed
        if wishes.logprobs is not None:
            body |= {"logprobs": wishes.logprobs, "return_tokens_as_token_ids": True}
        return body


def choices(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The choices of a streamed answer's chunks."""
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise RemoteError(chunk["error"]["message"])
        yield from chunk["choices"]


def read_tokens(choice: dict[str, Any], most: int | None) -> list[Chosen]:
    """The tokens of a choice, with their log-probabilities and `most` alternatives where those were asked for."""
    ids = choice.get("token_ids")
    if ids is None and choice.get("text"):
        raise RemoteError("it does not know return_token_ids, as vLLM (not the oldest) and `glmflow serve` do")
    logprobs = choice.get("logprobs") or {"token_logprobs": [], "top_logprobs": []}
    chosen = []
    # An end token may come without a log-probability.
    for token, logprob, likely in zip_longest(ids or [], logprobs["token_logprobs"], logprobs["top_logprobs"]):
        pairs = sorted((likely or {}).items(), key=lambda pair: -pair[1])[:most]  # vLLM adds the chosen one to these
        alternatives = tuple((int(name.removeprefix(TOKEN)), value) for name, value in pairs)
        chosen.append(Chosen(token, logprob, alternatives))
    return chosen
