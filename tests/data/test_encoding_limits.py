"""Rows at extreme lengths, under every template: what must survive a cut survives, and nothing else is lost."""

import random
from pathlib import Path
from typing import Any

import pytest

from glm.config import Data
from glm.data.encode import IGNORED, MARGIN, dialogue, encode_row, end_id, prompt_ids
from glm.errors import InputError
from glm.models import load_tokenizer
from glm.models.chat_encoding import encode_messages
from glm.models.chat_templates import CHATGLM1_NUMBERED, GLM4
from glm.models.fast_tokenizer import to_fast

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATES = ["chatglm1", "chatglm1-numbered", "chatglm2", "chatglm3", "glm4"]
Message = dict[str, str]


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    generation = {"chatglm1-numbered": "chatglm1", "glm4": "chatglm3"}.get(request.param, request.param)
    found = load_tokenizer(GOLDEN / f"tokenizer-{generation}-tiny")
    if request.param == "chatglm1-numbered":
        found.chat_template = CHATGLM1_NUMBERED
    if request.param == "glm4":
        found = to_fast(found)
        found.chat_template = GLM4
    return found


def rendered(tokenizer: Any, messages: list[Message]) -> list[int]:
    return encode_messages(tokenizer, messages, add_generation_prompt=True).input_ids


def random_dialogue(rng: random.Random) -> list[Message]:
    """1 to 12 rounds of 1 to 900 characters, which are all different places of one alphabet."""

    def text() -> str:
        return "".join(rng.choices("天地玄黄宇宙洪荒日月盈昃abc 1,。\n", k=rng.choice([1, 5, 40, 300, 900]))) + "尾"

    turns = [{"role": r, "content": text()} for _ in range(rng.choice([1, 2, 5, 12])) for r in ("user", "assistant")]
    return [{"role": "system", "content": "系统"}, *turns] if rng.random() < 0.3 else turns


def test_prompts(tokenizer: Any) -> None:
    """The newest rounds that fit are kept whole, with the system prompt; one question too long loses its middle."""
    rng = random.Random(5)
    seen = {"whole": 0, "rounds": 0, "shortened": 0}
    for _ in range(40):
        messages = random_dialogue(rng)[:-1]
        params = Data(max_source_length=rng.choice([50, 120, 400, 2000]), source_prefix=rng.choice(["", "前缀"]))
        ids, cut = prompt_ids(tokenizer, messages, params)
        assert len(ids) <= params.max_source_length
        own = messages[0]["role"] == "system"
        system = messages[:1] if own else [{"role": "system", "content": "前缀"}] if params.source_prefix else []
        rounds = messages[1:] if own else messages
        fitting = [
            kept
            for start in range(0, len(rounds), 2)
            if len(kept := rendered(tokenizer, system + rounds[start:])) <= params.max_source_length
        ]
        if fitting:
            assert ids == fitting[0]
            assert cut == (len(rendered(tokenizer, system + rounds)) > params.max_source_length)
            seen["rounds" if cut else "whole"] += 1
            continue
        assert cut and len(ids) > params.max_source_length - MARGIN
        question = rounds[-1]["content"]
        kept_whole = rendered(tokenizer, [*system, {"role": "user", "content": question[:1] + question[-1:]}])
        cue = next(at for at in range(1, len(ids)) if ids[-at] != kept_whole[-at])  # the end of the question and after
        assert cue > 1 and tokenizer.decode(ids).count("尾") == 1
        assert not system or system[0]["content"] in tokenizer.decode(ids)
        seen["shortened"] += 1
    assert all(count > 2 for count in seen.values()), seen


def test_dialogues(tokenizer: Any) -> None:
    """Training asks as chat does; the answer's start survives; an answer that is cut does not learn to end."""
    rng = random.Random(6)
    cuts = 0
    for _ in range(40):
        messages = random_dialogue(rng)
        params = Data(max_source_length=rng.choice([60, 400]), max_target_length=rng.choice([8, 60, 400]))
        example = dialogue(tokenizer, messages, params)
        ids, labels = example["input_ids"], example["labels"]
        answer_at = len(labels) - labels[::-1].index(IGNORED)
        prompt, prompt_cut = prompt_ids(tokenizer, messages[:-1], params)
        assert ids[: len(prompt)] == prompt and answer_at == len(prompt)
        assert len(ids) - answer_at <= params.max_target_length
        assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
        whole = dialogue(tokenizer, messages[-2:], Data(max_source_length=9999, max_target_length=9999))
        learned = [label for label in whole["labels"] if label != IGNORED]
        assert ids[answer_at:] == learned[: params.max_target_length]
        answer_cut = len(learned) > params.max_target_length
        assert (ids[-1] == end_id(tokenizer)) is not answer_cut
        assert example["truncated"] is (prompt_cut or answer_cut)
        cuts += example["truncated"]
    assert 5 < cuts < 40


def test_rows_without_an_answer_keep_their_prompt(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "天地"}]
    example = encode_row(tokenizer, {"id": "mine:rows.jsonl:7", "prompt": messages, "answer": None}, Data())
    assert example == {"input_ids": rendered(tokenizer, messages), "truncated": False}


def test_limits_that_hold_nothing_are_refused(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "天地"}, {"role": "assistant", "content": "玄黄"}]
    params = Data(max_source_length=16, max_target_length=4, source_prefix="系统" * 40)
    with pytest.raises(InputError, match="max_source_length 16 is too small"):
        dialogue(tokenizer, messages, params)


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2"])
@pytest.mark.parametrize("prefix", ["", "你是助手。"])
def test_the_layout_is_the_reference_s(name: str, prefix: str) -> None:
    """ChatGLM Efficient Tuning: prompt and answer encoded apart, joined by build_inputs_with_special_tokens."""
    tokenizer = load_tokenizer(GOLDEN / f"tokenizer-{name}-tiny")
    if name == "chatglm1":
        tokenizer.chat_template = CHATGLM1_NUMBERED
    turns = [("你好", "你好，我是助手。"), ("写一首诗", "春眠不觉晓，处处闻啼鸟。")]
    for count in (1, 2):
        messages = [
            {"role": role, "content": text}
            for turn in turns[:count]
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        text = f"{prefix}\n" if prefix else ""
        for at, (question, answer) in enumerate(turns[:count], start=1):
            text += f"[Round {at}]\n\n问：{question}\n\n答：" + (f"{answer}\n\n" if at < count else "")
        asked = tokenizer.encode(text, add_special_tokens=False)
        given = tokenizer.encode(turns[count - 1][1], add_special_tokens=False)
        gmask, start = (tokenizer.convert_tokens_to_ids(token) for token in ("[gMASK]", "<sop>"))
        special = [gmask, start]
        expected = [*asked, *special, *given] if name == "chatglm1" else [*special, *asked, *given]
        example = dialogue(tokenizer, messages, Data(source_prefix=prefix))
        assert example["input_ids"] == [*expected, tokenizer.eos_token_id]
        assert example["labels"][-len(given) - 1 :] == [*given, tokenizer.eos_token_id]
        assert example["labels"][: len(special)] == [IGNORED] * 2
