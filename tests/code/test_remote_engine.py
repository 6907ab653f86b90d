"""A server whose engine is another server: the same answers, wishes followed, failures told, nothing left running.

The other server is this project's own, which speaks vLLM's protocol where it is needed; vLLM itself does not run here.
"""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from apps.models import Resolved
from apps.serve.run import EngineOptions, open_engine
from apps.serve.vllm import find_vllm, free_port, readable_folder, vllm_server
from glm.errors import InputError
from glm.models import load_tokenizer
from glm.serving.answer import AnswerReader
from glm.serving.remote import RemoteEngine
from glm.serving.request import Event, Request, RequestQueue
from glm.serving.sampling import SamplingParams
from tests.code.running_server import GOLDEN, KEY, Running, wait_for, without_end

QUESTION = [{"role": "user", "content": "写一条酒店评论，以“房间”开头。"}]
TINY = GOLDEN / "chatglm2-e2e"


@pytest.fixture(scope="module")
def back(tmp_path_factory) -> Iterator[Running]:
    """The server with the model."""
    with Running("chatglm2", tmp_path_factory.mktemp("feedback")) as running:
        yield running


@pytest.fixture(scope="module")
def front(back: Running, tmp_path_factory) -> Iterator[Running]:
    """The one that clients talk to."""
    engine = RemoteEngine(load_tokenizer(TINY), f"{back.url}/v1", api_key=KEY, max_batch=4, max_waiting=8)
    with Running("chatglm2", tmp_path_factory.mktemp("feedback"), engine) as running:
        yield running


def ask(server: Running, **wishes):
    wishes = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "temperature": 0} | wishes
    return server.openai.chat.completions.create(**wishes)


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"logprobs": True, "top_logprobs": 3},
        {"temperature": 1, "top_p": 0.9, "seed": 3, "n": 2},
        {"temperature": 1, "seed": 4, "extra_body": {"top_k": 5}},
        {"max_tokens": 3},
    ],
)
def test_answers_are_those_of_the_engine_itself(back: Running, front: Running, wishes: dict) -> None:
    wanted, found = ask(back, **wishes), ask(front, **wishes)
    assert [choice.to_dict() for choice in found.choices] == [choice.to_dict() for choice in wanted.choices]
    assert found.usage == wanted.usage
    streamed = [chunk for chunk in ask(front, stream=True, **wishes) if chunk.choices]
    for index, choice in enumerate(wanted.choices):
        parts = [c for chunk in streamed for c in chunk.choices if c.index == index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[-1].finish_reason == choice.finish_reason


def test_a_stop_text_ends_the_answer_on_both_sides(back: Running, front: Running) -> None:
    text = ask(back).choices[0].message.content
    stopped = ask(front, stop=text[3:5], max_tokens=400).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[3:5])].rstrip(), "stop")
    wait_for(lambda: not back.engine.running and not front.engine.running)


def test_tokens_go_out_and_come_back_as_vllm_has_them(back: Running) -> None:
    def complete(**wishes) -> dict:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 400, "return_token_ids": True}
        return back.http.post("/v1/completions", json=body | wishes).json()["choices"][0]

    prompt = back.engine.tokenizer("今天天气")["input_ids"]
    whole = complete(logprobs=2, return_tokens_as_token_ids=True, max_tokens=12)
    ids = whole["token_ids"]
    assert whole["prompt_token_ids"] == prompt and len(ids) == 12
    assert whole["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert all(
        f"token_id:{token}" in likely for token, likely in zip(ids, whole["logprobs"]["top_logprobs"], strict=True)
    )
    stopped = complete(stop_token_ids=[ids[4]])
    assert stopped["token_ids"] == ids[: ids.index(ids[4]) + 1] and stopped["finish_reason"] == "stop"
    end = back.engine.tokenizer.eos_token_id
    free = complete(temperature=1, seed=1, ignore_eos=True, max_tokens=64)
    assert len(free["token_ids"]) == 64
    assert "token_ids" not in complete(return_token_ids=False)
    assert end in back.engine.ends


def test_who_goes_away_frees_the_place_on_both_sides_and_a_full_queue_is_said(back: Running, front: Running) -> None:
    wishes = {"model": "tiny", "messages": QUESTION, "max_tokens": 1500, "stream": True, "n": 4}
    with without_end(back.engine), front.openai.chat.completions.create(**wishes) as stream:
        next(iter(stream))
        wait_for(lambda: len(back.engine.running) == 4)
        with front.openai.chat.completions.create(**(wishes | {"n": 8})) as waiting:
            next(iter(waiting))
            with pytest.raises(openai.RateLimitError):
                ask(front)
    wait_for(lambda: not back.engine.running and not front.engine.running and not front.engine.waiting)
    assert "glmflow_requests_running 0.0" in front.http.get("/metrics").text


def test_no_server_a_wrong_key_and_too_long_answers_are_refused(back: Running) -> None:
    tokenizer = load_tokenizer(TINY)
    with pytest.raises(InputError, match="no OpenAI-compatible server"):
        RemoteEngine(tokenizer, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="401"):
        RemoteEngine(tokenizer, back.url, api_key="wrong")
    with pytest.raises(InputError, match="max_length: 100000"):
        RemoteEngine(tokenizer, back.url, api_key=KEY, max_length=100_000)


def test_an_engine_that_dies_is_an_error_of_the_server_and_the_server_goes_on(tmp_path: Path) -> None:
    with Running("chatglm2", tmp_path / "back") as back:
        engine = RemoteEngine(load_tokenizer(TINY), back.url, api_key=KEY, max_batch=2)
        with Running("chatglm2", tmp_path / "front", engine) as front:
            assert ask(front).choices
            back.uvicorn.should_exit = True
            back.thread.join()
            with pytest.raises(openai.InternalServerError, match="the engine behind this server"):
                ask(front)
            assert front.http.get("/healthz").status_code == 200
            wait_for(lambda: not engine.running)  # its place is free a moment after the client is told


STAND_IN = f"""#!{sys.executable}
# In the place of vllm, with its arguments. `real`: this project's own server, which speaks the same protocol.
import http.server, os, sys
sys.path.insert(0, {str(Path.cwd())!r})
verb, folder, *rest = sys.argv[1:]
given = dict(zip(rest[::2], rest[1::2]))
assert verb == "serve" and given["--generation-config"] == "vllm" and os.environ["VLLM_API_KEY"], sys.argv
if folder == "broken":
    sys.exit("CUDA out of memory")
if folder == "healthy":
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer((given["--host"], int(given["--port"])), Health).serve_forever()
from apps.cli import app
app(["serve", folder, "--host", given["--host"], "--port", given["--port"], "--name", given["--served-model-name"],
     "--max-batch", given["--max-num-seqs"], "--dtype", given["--dtype"], "--api-key", os.environ["VLLM_API_KEY"]])
"""
SERVER = """
import sys, time
from pathlib import Path
from apps.serve.vllm import find_vllm, vllm_server
with vllm_server(find_vllm(), Path("healthy"), max_batch=2, max_length=None, dtype=None):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def vllm_in_path(tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_vllm_is_started_asked_and_ended(vllm_in_path: None, back: Running) -> None:
    handler, tiny = signal.getsignal(signal.SIGTERM), Resolved(str(TINY), str(TINY))
    with open_engine(tiny, EngineOptions("vllm", max_batch=2, dtype="float32")) as engine:
        assert isinstance(engine, RemoteEngine) and engine.max_length == 1024
        [child] = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert greedy(engine) == greedy(back.engine)
    signal.signal(signal.SIGTERM, handler)
    assert gone(int(child))


def greedy(engine: RequestQueue) -> list[int]:
    """The tokens of an answer."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    prompt, params = engine.tokenizer("今天天气")["input_ids"], SamplingParams(20, temperature=0)
    engine.submit(Request(prompt, params, AnswerReader(engine.tokenizer), events.put, stream=False))
    return [chosen.token for chosen in events.get(timeout=60).chosen]


@pytest.mark.parametrize("killed", ["server", "vllm"])
def test_server_and_vllm_end_together(vllm_in_path: None, killed: str) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        child = int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text())
        os.kill(server.pid if killed == "server" else child, signal.SIGKILL)
        wait_for(lambda: gone(child) and gone(server.pid))


def test_no_vllm_and_one_that_does_not_come_up(tmp_path: Path, monkeypatch, capfd, request) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="pip install vllm"):
        find_vllm()
    request.getfixturevalue("vllm_in_path")
    with pytest.raises(InputError, match="ended with status 1"):
        vllm_server(find_vllm(), Path("broken"), max_batch=1, max_length=None, dtype=None).__enter__()
    assert "CUDA out of memory" in capfd.readouterr().err


def test_what_vllm_gets_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ChatGLM-6B"):
        readable_folder(Resolved("", str(GOLDEN / "chatglm1-e2e")), tmp_path, None)
    with pytest.raises(InputError, match="P-Tuning"):
        prefix = str(GOLDEN / "chatglm2-tiny-ptuning")
        readable_folder(Resolved("", str(TINY), adapters=(prefix,)), tmp_path, None)
    folder = readable_folder(Resolved("", str(TINY)), tmp_path, None)  # the authors' layout is exported
    assert folder.parent == tmp_path and readable_folder(Resolved("", str(folder)), tmp_path, None) == folder
