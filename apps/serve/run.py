"""`glmflow serve`: load the model, then listen."""

import logging
import sys
from dataclasses import replace

import uvicorn

from apps.models import Resolved
from apps.serve.app import Options, create_app
from glm.errors import InputError
from glm.serving.engine import Engine

LOCAL = {"127.0.0.1", "::1", "localhost"}


def check_binding(host: str, api_key: str | None, allow_anonymous: bool) -> None:
    """Raise InputError for a server that everyone in reach could use, unless that is wished."""
    if host not in LOCAL and not api_key and not allow_anonymous:
        raise InputError(
            f"host: {host} can be reached from other machines: give --api-key (or GLMFLOW_API_KEY), "
            "or --allow-anonymous if everyone may use it"
        )


def serve(
    model: Resolved,
    options: Options,
    *,
    host: str,
    port: int,
    max_batch: int,
    max_length: int | None,
    max_waiting: int,
    dtype: str | None = None,
) -> None:
    """Answer until stopped (Ctrl-C, or SIGTERM).

    Raises:
        InputError: there is no such model.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("glmflow.serve").setLevel(logging.INFO)
    loaded, tokenizer = model.load(dtype=dtype)
    options = replace(options, source_prefix=options.source_prefix or model.data.source_prefix, version=model.version)
    with Engine(loaded, tokenizer, max_batch=max_batch, max_length=max_length, max_waiting=max_waiting) as engine:
        how = "in slots" if engine.slots else "batch by batch"
        address = f"http://{host}:{port}/v1"
        print(
            f"{model.describe()}\n{address}   model {options.name!r}; up to {max_batch} answers at once, {how}, "
            f"of {engine.max_length} tokens with their prompts\n"
            f"    curl {address}/chat/completions -H 'Content-Type: application/json' \\\n"
            f"""        -d '{{"model": "{options.name}", "messages": [{{"role": "user", "content": "你好"}}]}}'""",
            flush=True,
        )
        app = create_app(engine, options)
        uvicorn.run(app, host=host, port=port, access_log=False, log_level="warning", timeout_graceful_shutdown=10)
