"""The serving engine: the same answers as `generate`, whoever comes and goes, and what becomes of wishes and faults."""

import queue
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import GlmForCausalLM

from glm.errors import InputError
from glm.generation.decode import generate
from glm.models import load_model, load_tokenizer
from glm.models.chat_encoding import encode_messages
from glm.serving.answer import AnswerReader
from glm.serving.engine import Engine
from glm.serving.request import Event, QueueFullError, Request
from glm.serving.sampling import SamplingParams, choose
from glm.serving.slots import Slots

GOLDEN = Path(__file__).parents[1] / "golden"
QUESTIONS = ["你好", "写一条酒店评论，以“房间”开头。", "2 + 2 = ?", "为什么天是蓝的？请详细说明。", "hello", "书"]


def prompts(tokenizer) -> list[list[int]]:
    return [
        encode_messages(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).input_ids
        for text in QUESTIONS
    ]


class Asked:
    """A request and what came back."""

    def __init__(self, tokenizer, prompt: list[int], stream: bool = True, stop: tuple[str, ...] = (), **wishes) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        params = SamplingParams(**{"max_new_tokens": 30, "temperature": 0.0, "stop": stop} | wishes)
        self.request = Request(prompt, params, AnswerReader(tokenizer, stop, raw=True), self.events.put, stream)

    def all(self) -> list[Event]:
        events = [self.events.get(timeout=60)]
        while events[-1].finish_reason is None:
            events.append(self.events.get(timeout=60))
        return events

    def tokens(self) -> list[int]:
        return [chosen.token for event in self.all() for chosen in event.chosen]


@pytest.fixture(scope="module", params=["chatglm1-e2e", "chatglm2-e2e", "chatglm3-e2e", "chatglm2-tiny-ptuning"])
def pair(request):
    """ChatGLM2 and ChatGLM3 in slots; a prefix language model and a prefix by `generate`."""
    tokenizers = {"chatglm2-tiny-ptuning": "tokenizer-chatglm2-tiny"}
    tokenizer = load_tokenizer(GOLDEN / tokenizers.get(request.param, request.param))
    return load_model(GOLDEN / request.param, dtype="float32"), tokenizer


@pytest.fixture(scope="module")
def glm2():
    return load_model(GOLDEN / "chatglm2-e2e", dtype="float32"), load_tokenizer(GOLDEN / "chatglm2-e2e")


def test_greedy_answers_are_those_of_generate_whoever_else_is_there(pair) -> None:
    model, tokenizer = pair
    known = model.config.vocab_size  # the model with a prefix knows fewer tokens than its tokenizer
    questions = [[token % known for token in prompt] for prompt in prompts(tokenizer)]
    wanted = generate(model, tokenizer, questions, max_new_tokens=30, batch_size=1)
    with Engine(model, tokenizer, max_batch=4) as engine:  # fewer places than requests
        assert (engine.slots is None) == (type(model) is not GlmForCausalLM or hasattr(model.model, "prefix_encoder"))
        asked = [Asked(tokenizer, prompt, stream=index % 2 == 0) for index, prompt in enumerate(questions)]
        for one in asked:
            engine.submit(one.request)
            time.sleep(0.01)  # so that they come while others are answered
        answers = [one.tokens() for one in asked]
    for answer, want in zip(answers, wanted, strict=True):
        ended = next((at for at, token in enumerate(want) if token in engine.ends), len(want))
        assert answer == want[:ended]


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(glm2) -> None:
    model, tokenizer = glm2
    wishes = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    with Engine(model, tokenizer) as engine:
        alone = Asked(tokenizer, prompts(tokenizer)[0], **wishes)
        engine.submit(alone.request)
        first = alone.tokens()
        crowd = [Asked(tokenizer, prompt, temperature=1.5) for prompt in prompts(tokenizer)]
        again, other = (Asked(tokenizer, prompts(tokenizer)[0], **wishes | {"seed": seed}) for seed in (7, 8))
        engine.submit(*[one.request for one in crowd], again.request, other.request)
        assert again.tokens() == first
        assert other.tokens() != first


def test_rows_that_leave_and_move_keep_their_caches() -> None:
    torch.manual_seed(0)
    model, tokenizer = load_model(GOLDEN / "chatglm2-e2e", dtype="float32"), load_tokenizer(GOLDEN / "chatglm2-e2e")
    assert type(model) is GlmForCausalLM
    slots = Slots(model, rows=3, columns=200)
    first, second, third = prompts(tokenizer)[:3]
    slots.admit([first, second, third])
    slots.drop([0, 1])  # the third moves to the front
    logits = slots.step([5])
    whole = model(input_ids=torch.tensor([[*third, 5]])).logits[0, -1]
    torch.testing.assert_close(logits[0], whole, atol=1e-4, rtol=1e-4)


def test_stop_texts_lengths_and_the_finish_reasons(glm2) -> None:
    model, tokenizer = glm2
    prompt = prompts(tokenizer)[1]
    with Engine(model, tokenizer) as engine:
        plain, short = Asked(tokenizer, prompt), Asked(tokenizer, prompt, max_new_tokens=3)
        engine.submit(plain.request, short.request)
        events = plain.all()
        text = "".join(event.text for event in events)
        assert len(short.tokens()) == 3
        stop = text[4:6]
        stopped = Asked(tokenizer, prompt, stop=(stop,))
        engine.submit(stopped.request)
        ended = stopped.all()
        assert "".join(event.text for event in ended) == text[: text.index(stop)]
        assert ended[-1].finish_reason == "stop"
        assert stopped.request.completion_tokens < plain.request.completion_tokens
        with pytest.raises(InputError, match="tokens"):
            engine.submit(Asked(tokenizer, [5] * engine.max_length).request)
        near = Asked(tokenizer, [5] * (engine.max_length - 2))
        engine.submit(near.request)
        assert near.all()[-1].finish_reason in ("length", "stop")
        assert near.request.completion_tokens <= 2


def test_a_cancelled_request_frees_its_place_and_a_full_queue_refuses(glm2) -> None:
    model, tokenizer = glm2
    prompt = prompts(tokenizer)[0]
    endless = {"max_new_tokens": 1900, "temperature": 5.0}
    with Engine(model, tokenizer, max_batch=1, max_waiting=1) as engine:
        engine.ends = frozenset()  # nothing ends by itself
        running, waiting = Asked(tokenizer, prompt, **endless), Asked(tokenizer, prompt)
        engine.submit(running.request)
        running.events.get(timeout=60)
        engine.submit(waiting.request)
        with pytest.raises(QueueFullError, match="1 wait"):
            engine.submit(Asked(tokenizer, prompt).request)
        running.request.cancel()
        assert running.all()[-1].finish_reason == "cancelled"
        assert running.request.completion_tokens < 1900
        assert waiting.all()[-1].finish_reason == "length"


def test_a_failed_batch_fails_its_requests_and_no_others(glm2, monkeypatch) -> None:
    model, tokenizer = glm2
    prompt = prompts(tokenizer)[0]
    with Engine(model, tokenizer) as engine:
        whole = engine.slots.step
        calls = iter([True])

        def once_out_of_memory(tokens):
            if next(calls, False):
                raise RuntimeError("out of memory")
            return whole(tokens)

        monkeypatch.setattr(engine.slots, "step", once_out_of_memory)
        failing, after = Asked(tokenizer, prompt), Asked(tokenizer, prompt)
        engine.submit(failing.request)
        assert failing.all()[-1].error == "out of memory"
        engine.submit(after.request)
        assert after.all()[-1].finish_reason in ("stop", "length")
    with pytest.raises(QueueFullError, match="shutting down"):
        engine.submit(Asked(tokenizer, prompt).request)
    assert not any(thread.name == "generation" for thread in threading.enumerate())


def test_draws_follow_the_distribution_and_top_p_and_top_k_cut_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draws = [(index + 0.5) / 1000 for index in range(1000)]

    def shares(**wishes) -> list[float]:
        params = SamplingParams(max_new_tokens=1, **wishes)
        tokens = [choice.token for choice in choose(logits.expand(1000, 4), [params] * 1000, draws)]
        return [tokens.count(token) / 1000 for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.002)
    assert shares(temperature=0.5) == pytest.approx(
        [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365], abs=2e-3
    )
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.002)
    assert shares(top_p=0.81) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.002)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.002)
    assert shares(top_k=1) == shares(temperature=0.0) == shares(top_p=1e-9) == [1, 0, 0, 0]
    for least in (1e-46, 1e-300):  # 0 in float32
        assert shares(top_p=least) == shares(temperature=least) == [1, 0, 0, 0]


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    wishes = [SamplingParams(1, temperature=0.0, logprobs=2), SamplingParams(1, temperature=0.0)]
    first, second = choose(logits, wishes, [0.0, 0.0])
    expected = logits[0].log_softmax(-1).tolist()
    assert first.logprob == pytest.approx(expected[0])
    assert [token for token, _ in first.alternatives] == [0, 1]
    assert [value for _, value in first.alternatives] == pytest.approx(expected[:2])
    assert (second.token, second.logprob, second.alternatives) == (1, None, ())
