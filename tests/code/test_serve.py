"""The HTTP server as clients see it: OpenAI's own package, LangChain, broken requests, people who leave."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import HealthCheck, settings
from schemathesis import openapi

from apps.models import Resolved
from apps.serve.app import Options
from apps.serve.run import EngineOptions, check_binding, serve
from glm.data.raw_rows import read_rows
from glm.data.registry import read_registry
from glm.errors import InputError
from glm.serving.engine import Engine
from tests.code.running_server import KEY, Running, wait_for, without_end

QUESTION = [{"role": "user", "content": "写一条酒店评论，以“房间”开头。"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    with Running("chatglm2", tmp_path_factory.mktemp("feedback")) as running:
        yield running


def ask(server: Running, **wishes):
    wishes = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "temperature": 0} | wishes
    return server.openai.chat.completions.create(**wishes)


def test_a_stream_is_the_whole_answer_in_pieces(server: Running) -> None:
    whole = ask(server)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {(last.id, "chat.completion.chunk", "tiny")}
    assert last.id != whole.id and all(chunk.created for chunk in chunks)


def test_wishes_are_followed(server: Running) -> None:
    assert ask(server, max_tokens=3).choices[0].finish_reason == "length"
    assert ask(server, max_tokens=3).usage.completion_tokens == 3
    text = ask(server).choices[0].message.content
    stop = text[3:5]
    stopped = ask(server, stop=[stop, "绝不"])
    assert stopped.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert stopped.choices[0].finish_reason == "stop"

    def sampled(**wishes) -> list[str]:
        return [choice.message.content for choice in ask(server, temperature=1, top_p=1, **wishes).choices]

    assert sampled(n=3, seed=5) == sampled(n=3, seed=5) and len(set(sampled(n=3, seed=5))) == 3
    assert sampled(seed=5) == sampled(n=3, seed=5)[:1] and sampled(seed=5) != sampled(seed=6)
    told = ask(server, logprobs=True, top_logprobs=2, max_tokens=5).choices[0].logprobs.content
    assert all(entry.logprob == max(other.logprob for other in entry.top_logprobs) <= 0 for entry in told)
    assert b"".join(bytes(entry.bytes) for entry in told).decode(errors="ignore").strip()


def test_completions(server: Running) -> None:
    def complete(**wishes):
        return server.openai.completions.create(model="tiny", temperature=0, max_tokens=8, **wishes)

    one = complete(prompt="今天天气", logprobs=2)
    assert one.choices[0].text and len(one.choices[0].logprobs.tokens) == len(one.choices[0].logprobs.token_logprobs)
    several = complete(prompt=["今天天气", "今天天气", "房间"], n=2)
    assert [choice.index for choice in several.choices] == list(range(6))
    assert several.choices[3].text == one.choices[0].text
    ids = server.engine.tokenizer("今天天气")["input_ids"]
    assert complete(prompt=ids).choices[0].text == one.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in complete(prompt=ids, stream=True)) == one.choices[0].text


def test_langchain(server: Running) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=KEY, temperature=0, max_tokens=16)
    answer = model.invoke("你好").content
    assert answer and "".join(chunk.content for chunk in model.stream("你好")) == answer


def test_tools_of_a_generation_that_has_them(tmp_path: Path, server: Running) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    result = {"role": "tool", "content": "晴", "tool_call_id": "1"}
    told = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, result]
    with pytest.raises(openai.BadRequestError, match="no place for them"):
        ask(server, tools=tools)
    with Running("chatglm3", tmp_path) as tooled:
        plain = ask(tooled).usage.prompt_tokens
        assert ask(tooled, tools=tools, tool_choice="none").usage.prompt_tokens == plain
        assert ask(tooled, tools=tools).usage.prompt_tokens > plain
        assert ask(tooled, messages=told, tools=tools).usage.prompt_tokens > plain
        written = "weather\n ```python\ntool_call(city='北京')\n```"
        tokens = tooled.engine.tokenizer.encode(written, add_special_tokens=False)
        # An untrained model calls nothing: the tokens that a trained one would choose are put into its mouth.
        script(tooled.engine, [*tokens, tooled.engine.tokenizer.eos_token_id])
        said = ask(tooled, tools=tools, max_tokens=64).choices[0]
        assert (said.finish_reason, said.message.content) == ("tool_calls", None)
        [made] = said.message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "北京"})
        chunks = list(ask(tooled, tools=tools, max_tokens=64, stream=True))
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert chunks[-2].choices[0].delta.tool_calls[0].function.name == "weather"


def script(engine: Engine, tokens: list[int]) -> None:
    """Let the engine's model prefer these tokens, whatever it is asked."""
    take = engine._take

    def scripted(request, chosen) -> None:
        take(request, chosen._replace(token=tokens[request.completion_tokens]))

    engine._take = scripted


def test_errors_have_openais_shape_and_name_the_fault(server: Running) -> None:
    cases = [
        ({"model": "other"}, 404, "other"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
        ({"messages": [*QUESTION, *QUESTION]}, 400, "take turns"),
        ({"messages": [{"role": "user", "content": "好" * 4000}]}, 400, "tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"stop": [""]}, 400, "stop.0: String should have at least 1"),
        ({"stop": ["a"] * 5}, 400, "stop: List should have at most 4"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "0.content.0.type: Input"),
        ({"functions": [{"name": "weather"}]}, 400, "functions"),
        ({"repetition_penalty": 1.2}, 400, "repetition_penalty"),
        ({"seed": 10**30}, 400, "seed"),
        ({"n": 1000}, 400, "n"),
    ]
    for wishes, status, named in cases:
        body = json.dumps({"model": "tiny", "messages": QUESTION} | wishes)
        response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert (response.status_code, named in response.json()["error"]["message"]) == (status, True), response.text
    broken = {b"{": "character 1", b"\x1f\x8b": "UTF-8", b"[" * 20_000: "recursion", b"null": "body", b"": "body"}
    for content, named in broken.items():
        response = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert (response.status_code, named in response.json()["error"]["message"]) == (400, True), response.text
    as_curl_has_it = server.http.post("/v1/chat/completions", data={"{": ""})
    assert "expected the header Content-Type: application/json" in as_curl_has_it.json()["error"]["message"]
    assert server.http.post("/v1/chat/completions", content=b"x" * 200_001).status_code == 413
    chunked = server.http.post("/v1/chat/completions", content=iter([b"x" * 100_000] * 3))  # does not say its length
    assert chunked.status_code == 413 and chunked.json()["error"]["message"]
    assert server.http.get("/../../etc/passwd").status_code == 404


def test_the_key_is_needed_everywhere_but_for_the_health_check(server: Running) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            assert httpx.get(server.url + path, headers=header).status_code == 401
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert [model.id for model in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/v1/models/tiny", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    assert server.http.get("/v1/models/other").status_code == 404
    for host, key, anonymous in (("0.0.0.0", None, False), ("192.168.1.1", "", False)):
        with pytest.raises(InputError, match="--api-key"):
            check_binding(host, key, anonymous)
    check_binding("127.0.0.1", None, False), check_binding("0.0.0.0", "k", False), check_binding("0.0.0.0", None, True)


def test_an_address_that_is_not_to_be_had_is_told_before_the_model_is_loaded(server: Running) -> None:
    taken = int(server.url.rpartition(":")[2])
    for host, port, said in (("127.0.0.1", taken, "in use"), ("192.0.2.1", 8000, "address"), ("no.such.host", 1, "")):
        with pytest.raises(InputError, match=f"host, port: {host}:{port}: .*{said}"):
            serve(Resolved("a", "a/model-that-is-not-there"), Options("a"), EngineOptions(), host=host, port=port)


def test_who_goes_away_frees_the_place_and_a_full_queue_is_said(tmp_path: Path) -> None:
    with Running("chatglm2", tmp_path, max_batch=1, max_waiting=0) as small, without_end(small.engine):
        endless = {"model": "tiny", "messages": QUESTION}
        with small.http.stream("POST", "/v1/chat/completions", json=endless | {"stream": True}) as response:
            lines = response.iter_lines()  # to be kept: httpx hangs up when it is collected
            next(lines)
            with pytest.raises(openai.RateLimitError, match="are answered"):
                ask(small)
        wait_for(lambda: not small.engine.running)
        with pytest.raises(httpx.ReadTimeout):
            small.http.post("/v1/chat/completions", json=endless, timeout=0.3)
        wait_for(lambda: not small.engine.running)
        metrics = small.http.get("/metrics").text
        assert 'glmflow_http_responses_total{path="/v1/chat/completions",status="429"} 1.0' in metrics
        assert "glmflow_requests_running 0.0" in metrics


def test_feedback_becomes_rows_that_training_takes(server: Running) -> None:
    answer = ask(server, n=2, temperature=1, top_p=1, seed=1)
    texts = [choice.message.content for choice in answer.choices]

    def say(**what) -> httpx.Response:
        return server.http.post("/v1/feedback", json={"id": answer.id} | what)

    assert say(label=True).json() == {"id": answer.id, "stored": "labels.jsonl"}
    assert say(chosen=1, rejected=0).json()["stored"] == "pairs.jsonl"
    assert say(better="房间很好。", index=1).status_code == 200
    nothing_new, two_kinds = {"chosen": 1, "rejected": 1}, {"label": True, "better": "x"}
    for wrong in ({}, two_kinds, {"chosen": 1}, nothing_new, {"label": True, "index": 9}, {"better": ""}):
        assert say(**wrong).status_code == 400
    assert server.http.post("/v1/feedback", json={"id": "../../x", "label": True}).status_code == 400

    files = {path.name: path for path in server.feedback.iterdir()}
    assert set(files) == {"labels.jsonl", "pairs.jsonl"}
    [labelled] = rows(server.feedback, "kto")
    assert (labelled["prompt"], labelled["answer"], labelled["label"]) == (QUESTION, texts[0], True)
    pair, better = rows(server.feedback, "reward")
    assert pair["answers"] == [texts[1], texts[0]] and better["answers"] == ["房间很好。", texts[1]]
    kept = json.loads(files["pairs.jsonl"].read_text().splitlines()[0])
    assert (kept["id"], kept["model_version"]) == (answer.id, "tiny/1")


def rows(folder: Path, use: str) -> list[dict]:
    """The rows of this use; those of the other kind are dropped, and none is broken."""
    read = list(read_rows("feedback", read_registry(Path("data"), ["feedback"])["feedback"], folder, use))
    assert not any(one.broken for one in read), read
    return [one.row for one in read if one.row]


@pytest.mark.filterwarnings("ignore")
def test_no_request_that_the_schema_allows_or_forbids_ends_in_a_fault_of_the_server(server: Running) -> None:
    schema = openapi.from_asgi("/openapi.json", server.app, headers={"authorization": f"Bearer {KEY}"})
    for operation in schema.get_all_operations():
        check_operation(operation.ok(), server)


def check_operation(operation, server: Running) -> None:
    from hypothesis import given, seed
    from schemathesis import GenerationMode

    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @seed(0)
    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=right | wrong)
    def run(case) -> None:
        if isinstance(case.body, dict):
            case.body |= {"max_tokens": 2} if "max_tokens" in case.body else {}
            if case.body.get("model"):
                case.body["model"] = "tiny"
        response = case.call(base_url=server.url, headers={"authorization": f"Bearer {KEY}"})
        assert response.status_code < 500, (response.status_code, response.text, case.body)

    run()
