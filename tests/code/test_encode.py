"""Prompts and labels: what survives a cut, and which tokens are learned."""

from pathlib import Path
from typing import Any

import pytest

from glm.config import Data
from glm.data.encode import IGNORED, dialogue, end_id, prompt_ids
from glm.errors import InputError
from glm.models import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
Message = dict[str, str]


def said(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module", params=["chatglm1", "chatglm2", "chatglm3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(GOLDEN / f"{request.param}-e2e")


def test_labels_are_the_answer_and_its_end(tokenizer: Any) -> None:
    example = dialogue(tokenizer, said("你好", "你好，世界"), Data())
    prompt, cut = prompt_ids(tokenizer, said("你好"), Data())
    assert not cut and not example["truncated"]
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert example["labels"][len(prompt) :] == example["input_ids"][len(prompt) :]
    assert "你好,世界" in tokenizer.decode(example["input_ids"][len(prompt) :]).replace("，", ",")


def test_every_answer_is_learned_where_the_model_allows_it(tokenizer: Any) -> None:
    example = dialogue(tokenizer, said("你好", "世界", "再见", "再会"), Data())
    learned = tokenizer.decode([token for token in example["labels"] if token != IGNORED])
    assert "再会" in learned and "再见" not in learned
    # ChatGLM-6B sees the whole context from both sides: an earlier answer would be learned from itself
    assert ("世界" in learned) == (type(tokenizer).__name__ != "ChatGLM1Tokenizer")


def test_old_rounds_go_first_and_the_last_question_survives(tokenizer: Any) -> None:
    history = [text for i in range(20) for text in (f"旧问题{i}", f"旧回答{i}")]
    ids, cut = prompt_ids(tokenizer, said(*history, "最后的问题"), Data(max_source_length=64))
    text = tokenizer.decode(ids)
    assert cut and len(ids) <= 64
    assert "最后的问题" in text and "旧问题19" in text and "旧问题0" not in text


def test_a_long_question_loses_its_middle_only(tokenizer: Any) -> None:
    question = "开头" + "中间" * 300 + "结尾"
    data = Data(max_source_length=60, source_prefix="系统提示")
    ids, cut = prompt_ids(tokenizer, said(question), data)
    text = tokenizer.decode(ids)
    assert cut and 50 <= len(ids) <= 60
    assert "开头" in text and "结尾" in text and "系统提示" in text
    assert ids[-3:] == prompt_ids(tokenizer, said("结尾"), data)[0][-3:]  # what opens the answer


def test_an_answer_that_is_cut_does_not_learn_to_stop(tokenizer: Any) -> None:
    example = dialogue(tokenizer, said("你好", "世界" * 200), Data(max_target_length=16))
    learned = [token for token in example["labels"] if token != IGNORED]
    assert example["truncated"] and len(learned) == 16
    assert end_id(tokenizer) not in learned


def test_text_cannot_spell_a_control_token(tokenizer: Any) -> None:
    plain = dialogue(tokenizer, said("你好", "世界"), Data())
    control = set(plain["input_ids"]) & set(tokenizer.all_special_ids)
    spelled = "".join(tokenizer.all_special_tokens)
    injected = dialogue(tokenizer, said(f"你好{spelled}", f"世界{spelled}"), Data())["input_ids"]
    for token in control - {tokenizer.unk_token_id}:
        assert injected.count(token) == plain["input_ids"].count(token), tokenizer.decode([token])


def test_a_prompt_that_can_never_fit_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"data\.max_source_length 16 is too small"):
        prompt_ids(tokenizer, said("你好"), Data(max_source_length=16, source_prefix="系统" * 100))
