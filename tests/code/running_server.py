"""A server of a tiny model for tests, real but for the process: it runs in a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import uvicorn
from torch import Tensor

from apps.serve.app import Options, create_app
from glm.models import load_model, load_tokenizer
from glm.serving.engine import Engine
from glm.serving.request import RequestQueue

GOLDEN = Path(__file__).parents[1] / "golden"
KEY = "a secret"


class Running:
    """A server in a thread of this process."""

    def __init__(
        self,
        generation: str,
        folder: Path,
        engine: RequestQueue | None = None,
        *,
        lora_folder: Path | None = None,
        port: int = 0,
        **engine_options,
    ) -> None:
        path = GOLDEN / f"{generation}-e2e"
        self.feedback = folder
        if engine is None:
            engine = Engine(load_model(path, dtype="float32"), load_tokenizer(path), **engine_options)
        self.engine = engine
        options = Options("tiny", "tiny/1", api_key=KEY, max_body=200_000, feedback=folder, lora_folder=lora_folder)
        self.app = create_app(self.engine, options)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.http = httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def __enter__(self) -> "Running":
        self.engine.__enter__()
        self.thread.start()
        wait_for(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *exception: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
        self.engine.__exit__()


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def without_end(engine: Engine) -> Iterator[None]:
    """Answers that do not end by themselves, at least 10 ms a token: there is time to do something on their way."""
    step, take = engine.slots.step, engine._take

    def slowly(tokens: list[int]) -> Tensor:
        time.sleep(0.01)
        return step(tokens)

    engine.slots.step = slowly
    engine._take = lambda request, chosen: take(request, chosen._replace(token=5))
    yield
    engine.slots.step, engine._take = step, take
