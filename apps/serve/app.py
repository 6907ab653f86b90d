"""The routes: OpenAI's chat and completions, models, feedback, health and metrics."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from apps.serve.answers import (
    Asked,
    Choice,
    EngineError,
    chat_logprobs,
    chat_message,
    completion_logprobs,
    sse,
    tool_calls,
)
from apps.serve.faults import fault
from apps.serve.feedback import FeedbackStore
from apps.serve.guard import Guard, error_body
from apps.serve.loras import add_lora_routes
from apps.serve.metrics import Metrics
from apps.serve.schema import ChatRequest, CompletionRequest, Feedback, Sampling
from glm.data.encode import with_prefix
from glm.errors import InputError
from glm.models.chat_encoding import encode_messages, refuse_surrogates
from glm.serving.answer import AnswerReader
from glm.serving.engine import Engine
from glm.serving.request import QueueFullError, RequestQueue
from glm.serving.sampling import SamplingParams
from glm.serving.tools import template_messages, tool_format

CHARACTERS_PER_TOKEN = 64  # no vocabulary packs more: longer texts are refused before they are encoded
log = logging.getLogger("glmflow.serve")


@dataclass(frozen=True)
class Options:
    """How to serve."""

    name: str  # of the model, for clients
    version: str = ""  # what exactly it is; kept with feedback
    source_prefix: str = ""
    temperature: float = 0.95  # where a request says nothing; the reference's
    top_p: float = 0.7
    api_key: str | None = None
    max_body: int = 2_000_000  # bytes
    log_content: bool = False
    feedback: Path = Path("data/feedback")
    lora_folder: Path | None = None  # below which adapters may be loaded by clients


def create_app(engine: RequestQueue, options: Options) -> FastAPI:
    """The application around a running engine."""
    app = FastAPI(title="glmflow", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    metrics = Metrics(engine)
    store = FeedbackStore(options.feedback, options.version or options.name)
    server = Server(engine, options, metrics, store)
    started = int(time.time())

    @app.get("/healthz")
    @app.get("/health")  # vLLM's name
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": options.name, "object": "model", "created": started, "owned_by": "glmflow"}
        more = {"version": options.version, "max_model_len": engine.max_length}
        loras = [model | {"id": name, "parent": options.name} for name in engine.lora_names()]
        return {"object": "list", "data": [model | more, *loras]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.lora_of(name)
        return next(one for one in (await models())["data"] if one["id"] == name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await server.chat(body, http)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await server.complete(body, http)

    @app.post("/v1/feedback")
    async def feedback(body: Feedback) -> dict[str, str]:
        return {"id": body.id, "stored": store.add(body).name}

    if options.lora_folder is not None and isinstance(engine, Engine):
        add_lora_routes(app, engine, options.lora_folder)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        said = fault(error.errors(), http.headers.get("content-type", ""))
        return failure(400, "invalid_request", said)

    @app.exception_handler(InputError)
    async def refused(_: Request, error: InputError) -> JSONResponse:
        code = "context_length_exceeded" if "the prompt has" in str(error) else "invalid_request"
        return failure(400, code, str(error))

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        return failure(429, "queue_full", str(error), {"retry-after": "1"})

    @app.exception_handler(EngineError)
    async def failed(_: Request, error: EngineError) -> JSONResponse:
        return failure(500, "engine_error", str(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        said = str(error.detail)
        if error.status_code == 400 and error.__cause__:  # FastAPI's "There was an error parsing the body"
            said = f"the body is not JSON in UTF-8: {error.__cause__}"
        return failure(error.status_code, "http_error", said, error.headers)

    paths = {str(getattr(route, "path", "")) for route in app.routes}
    app.add_middleware(Guard, options.api_key, options.max_body, metrics, paths)
    return app


def failure(status: int, code: str, message: str, headers: Any = None) -> JSONResponse:
    """An error; lone surrogates that a client sent are not sent back."""
    printable = message.encode("utf-8", errors="replace").decode()
    return JSONResponse(error_body(status, code, printable), status, headers=headers)


class Server:
    """Answers the two kinds of question."""

    def __init__(self, engine: RequestQueue, options: Options, metrics: Metrics, store: FeedbackStore) -> None:
        self.engine, self.options, self.metrics, self.store = engine, options, metrics, store
        self.tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self.tool_format = tool_format(engine.tokenizer)

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """An answer to a dialogue."""
        lora = self.lora_of(body.model)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        if tools and self.tool_format is None:
            raise InputError("tools: this model's prompt format has no place for them (ChatGLM3 and GLM-4 have)")
        if body.tool_choice == "none":
            tools = []
        given = [message.for_template() for message in body.messages]
        self.check_size(sum(len(message["content"] or "") for message in given))
        if given[-1]["role"] == "assistant":
            raise InputError("messages: the last message must be the user's, or a tool's")
        messages = with_prefix(template_messages(self.tool_format, given), self.options.source_prefix)
        chat = encode_messages(self.tokenizer, messages, tools=tools or None, add_generation_prompt=True)
        params = self.params(body, body.max_completion_tokens or body.max_tokens, len(chat.input_ids))
        if body.logprobs:
            params = replace(params, logprobs=body.top_logprobs or 0)
        asked = Asked("chatcmpl", body.model, lora)
        form = self.tool_format if tools else None
        for one in self.seeded(params, body.n):
            asked.add(chat.input_ids, one, AnswerReader(self.tokenizer, one.stop, tool_format=form), body.stream)
        asked.submit(self.engine)

        def logprobs(chosen: Any) -> dict[str, Any] | None:
            return chat_logprobs(self.tokenizer, chosen) if body.logprobs else None

        def done() -> None:
            self.ended(asked, given)

        if body.stream:
            return event_stream(self.chat_chunks(asked, body, logprobs, done))
        await self.whole(asked, http)
        done()
        choices = [
            {
                "index": index,
                "message": chat_message(choice),
                "logprobs": logprobs(choice.chosen),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(asked.choices)
        ]
        return JSONResponse(self.head(asked, "chat.completion") | {"choices": choices, "usage": asked.usage()})

    async def chat_chunks(
        self, asked: Asked, body: ChatRequest, logprobs: Callable[[Any], Any], done: Callable[[], None]
    ) -> AsyncIterator[str]:
        """The chunks of a streamed chat."""
        head = self.head(asked, "chat.completion.chunk")
        with_usage = bool(body.stream_options and body.stream_options.include_usage)

        def chunk(index: int, delta: dict[str, Any], finish: str | None = None, chosen: Any = ()) -> str:
            choice = {"index": index, "delta": delta, "logprobs": logprobs(chosen) if chosen else None}
            whole = head | {"choices": [choice | {"finish_reason": finish}]}
            return sse(whole | {"usage": None} if with_usage else whole)

        for index in range(len(asked.choices)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, event in asked.events():
            choice = asked.choices[index]
            if event.text or event.chosen:
                yield chunk(index, {"content": event.text}, chosen=event.chosen)
            if choice.finish_reason:
                if calls := tool_calls(choice):
                    yield chunk(index, {"tool_calls": [{"index": at} | call for at, call in enumerate(calls)]})
                yield chunk(index, {}, choice.finish_reason)
        done()
        if with_usage:
            yield sse(head | {"choices": [], "usage": asked.usage()})

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        """Continuations of plain text."""
        lora = self.lora_of(body.model)
        prompts = self.encoded(body.prompt)
        asked = Asked("cmpl", body.model, lora)
        for prompt in prompts:
            params = replace(
                self.params(body, body.max_tokens or 16, len(prompt)),
                logprobs=body.logprobs,
                stop_token_ids=tuple(body.stop_token_ids or ()),
                ignore_eos=body.ignore_eos,
            )
            for one in self.seeded(params, body.n):
                asked.add(prompt, one, AnswerReader(self.tokenizer, one.stop, raw=True), body.stream)
        asked.submit(self.engine)

        def done() -> None:
            self.ended(asked, None)

        if body.stream:
            return event_stream(self.completion_chunks(asked, body, done))
        await self.whole(asked, http)
        done()
        choices = [
            self.completion_choice(index, choice.text, choice, choice.chosen, body, 0)
            for index, choice in enumerate(asked.choices)
        ]
        return JSONResponse(self.head(asked, "text_completion") | {"choices": choices, "usage": asked.usage()})

    async def completion_chunks(
        self, asked: Asked, body: CompletionRequest, done: Callable[[], None]
    ) -> AsyncIterator[str]:
        """The chunks of streamed continuations."""
        head = self.head(asked, "text_completion")
        async for index, event in asked.events():
            choice = asked.choices[index]
            offset = len(choice.text) - len(event.text)
            part = self.completion_choice(index, event.text, choice, event.chosen, body, offset)
            yield sse(head | {"choices": [part]})
        done()
        if body.stream_options and body.stream_options.include_usage:
            yield sse(head | {"choices": [], "usage": asked.usage()})

    def completion_choice(
        self, index: int, text: str, choice: Choice, chosen: Any, body: CompletionRequest, offset: int
    ) -> dict[str, Any]:
        logprobs = None
        if body.logprobs is not None:
            logprobs = completion_logprobs(self.tokenizer, chosen, offset, bool(body.return_tokens_as_token_ids))
        told = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason or None}
        if body.return_token_ids:
            request = choice.request
            last = [request.ended_by] if choice.finish_reason and request.ended_by is not None else []
            told["token_ids"] = [one.token for one in chosen] + last
            first = len(choice.chosen) == len(chosen)  # of a stream, whose chunks are then shorter
            told["prompt_token_ids"] = request.prompt if first else None
        return told

    async def whole(self, asked: Asked, http: Request) -> None:
        """Wait for all choices; if the client goes away before, they are cancelled and their places free.

        Raises:
            EngineError: a choice failed.
        """

        async def collect() -> None:
            async for _ in asked.events():
                pass

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise HTTPException(499, "the client has gone away")
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def params(self, body: Sampling, max_tokens: int | None, prompt_length: int) -> SamplingParams:
        """The request's wishes, with the server's own values where it has none."""
        options, room = self.options, max(1, self.engine.max_length - prompt_length)
        return SamplingParams(
            max_new_tokens=min(max_tokens or room, room),
            temperature=options.temperature if body.temperature is None else body.temperature,
            top_p=options.top_p if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=body.seed,
            stop=body.stops(),
        )

    def seeded(self, params: SamplingParams, n: int) -> list[SamplingParams]:
        """n times the same wishes; a given seed goes on counting."""
        if params.seed is None:
            return [params] * n
        return [replace(params, seed=params.seed + index) for index in range(n)]

    def encoded(self, prompt: str | list[Any]) -> list[list[int]]:
        """A completion's prompts as token ids, with the tokens that the model's sequences begin with."""
        listed = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        out = []
        for one in listed:
            if isinstance(one, str):
                self.check_size(len(one))
                refuse_surrogates(one)
                one = self.tokenizer(one, split_special_tokens=True)["input_ids"]
            elif max(one) >= self.engine.vocab_size:
                raise InputError(f"prompt: {max(one)} is no token of this model")
            self.engine.check(one)
            out.append(one)
        return out

    def lora_of(self, name: str) -> str:
        """The adapter that a model's name stands for; "" for the model itself."""
        if name == self.options.name:
            return ""
        if name not in self.engine.lora_names():
            raise HTTPException(404, f"model {name!a} is not served here; /v1/models lists {self.options.name!r}")
        return name

    def check_size(self, characters: int) -> None:
        most = CHARACTERS_PER_TOKEN * self.engine.max_length
        if characters > most:
            raise InputError(f"the prompt has {characters} characters; this server takes {most} at most")

    def head(self, asked: Asked, kind: str) -> dict[str, Any]:
        """What answers and all chunks begin with."""
        return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}

    def ended(self, asked: Asked, messages: list[dict[str, Any]] | None) -> None:
        """Count, log and remember an answer."""
        for choice in asked.choices:
            self.metrics.count(choice.request, choice.finish_reason)
        usage = asked.usage()
        reasons = ",".join(choice.finish_reason for choice in asked.choices)
        log.info("%s %d+%d tokens %s", asked.id, usage["prompt_tokens"], usage["completion_tokens"], reasons)
        if self.options.log_content:
            log.info("%s %r -> %r", asked.id, messages, [choice.text for choice in asked.choices])
        if messages is not None and not any(choice.request.reader.tool_calls for choice in asked.choices):
            self.store.remember(asked.id, messages, [choice.text for choice in asked.choices])


def event_stream(chunks: AsyncIterator[str]) -> StreamingResponse:
    """A stream of chunks with its end mark; a failure is told in the stream, since the status is sent already."""

    async def whole() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield chunk
        except EngineError as error:
            yield sse(error_body(500, "engine_error", str(error)))
        yield "data: [DONE]\n\n"

    return StreamingResponse(whole(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
