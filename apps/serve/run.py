"""`glmflow serve`: load the model, then listen."""

import logging
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from transformers import GenerationConfig

from apps.models import Resolved
from apps.serve.app import Options, create_app
from apps.serve.vllm import find_vllm, readable_folder, vllm_server
from glm.errors import InputError
from glm.models import load_tokenizer
from glm.serving.engine import Engine
from glm.serving.remote import RemoteEngine
from glm.serving.request import RequestQueue

LOCAL = {"127.0.0.1", "::1", "localhost"}


@dataclass(frozen=True)
class EngineOptions:
    """Who computes the answers, and how many at once."""

    kind: Literal["own", "vllm"] = "own"
    url: str | None = None  # of an engine that runs already
    url_key: str | None = None  # API key of that one
    max_batch: int = 32
    max_length: int | None = None
    max_waiting: int = 256
    dtype: str | None = None


def check_binding(host: str, api_key: str | None, allow_anonymous: bool) -> None:
    """Raise InputError for a server that everyone in reach could use, unless that is wished."""
    if host not in LOCAL and not api_key and not allow_anonymous:
        raise InputError(
            f"host: {host} can be reached from other machines: give --api-key (or GLMFLOW_API_KEY), "
            "or --allow-anonymous if everyone may use it"
        )


def take_address(host: str, port: int) -> socket.socket:
    """A socket of this address, at which nobody is heard yet: who loads a model first has it already.

    Raises:
        InputError: another program has it, or this machine has no such address.
    """
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener:
            listener.close()
        raise InputError(f"host, port: {host}:{port}: {error.strerror}; choose another --port or --host") from None
    return listener


def serve(model: Resolved, options: Options, wanted: EngineOptions, *, host: str, port: int) -> None:
    """Answer until stopped (Ctrl-C, or SIGTERM).

    Raises:
        InputError: there is no such model, the engine cannot serve it, or the address is not to be had.
    """
    listener = take_address(host, port)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("glmflow.serve").setLevel(logging.INFO)
    options = replace(options, source_prefix=options.source_prefix or model.data.source_prefix, version=model.version)
    with open_engine(model, wanted) as engine:
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        print(
            f"{model.describe()}\n{address}   model {options.name!r}; up to {engine.max_batch} answers at once, "
            f"{engine.how}, of {engine.max_length} tokens with their prompts\n"
            f"    curl {address}/chat/completions -H 'Content-Type: application/json' \\\n"
            f"""        -d '{{"model": "{options.name}", "messages": [{{"role": "user", "content": "你好"}}]}}'""",
            flush=True,
        )
        app = create_app(engine, options)
        answer(app, listener, farewell=10)


def answer(app: FastAPI, listener: socket.socket, farewell: int) -> None:
    """Serve the application until Ctrl-C or SIGTERM; requests under way then have `farewell` seconds to end."""
    config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=farewell)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when it is done
        uvicorn.Server(config).run([listener])


@contextmanager
def open_engine(model: Resolved, wanted: EngineOptions) -> Iterator[RequestQueue]:
    """The running engine that was asked for: ours, a vLLM of our own, or one at an address.

    Raises:
        InputError: there is no such model, or the engine cannot serve it.
    """
    sizes: dict[str, Any] = {
        "max_batch": wanted.max_batch,
        "max_length": wanted.max_length,
        "max_waiting": wanted.max_waiting,
    }
    if wanted.url:
        with remote_engine(model, wanted.url, wanted.url_key, sizes) as engine:
            yield engine
    elif wanted.kind == "vllm":
        program = find_vllm()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clearing away what is begun here
        with tempfile.TemporaryDirectory(prefix="glmflow-vllm-") as scratch:
            folder = readable_folder(model, Path(scratch), wanted.dtype)
            child = vllm_server(
                program, folder, max_batch=wanted.max_batch, max_length=wanted.max_length, dtype=wanted.dtype
            )
            with child as (url, key), remote_engine(model, url, key, sizes) as engine:
                yield engine
    else:
        with Engine(*model.load(dtype=wanted.dtype), **sizes) as engine:
            yield engine


def remote_engine(model: Resolved, url: str, key: str | None, sizes: dict[str, Any]) -> RemoteEngine:
    """An engine elsewhere, with the tokenizer, template and end tokens of `model`."""
    tokenizer = load_tokenizer(model.base, revision=model.revision)
    try:
        config = GenerationConfig.from_pretrained(model.base, revision=model.revision)
    except OSError:  # models of 2023 have none
        config = None
    return RemoteEngine(tokenizer, url, config, api_key=key, **sizes)
