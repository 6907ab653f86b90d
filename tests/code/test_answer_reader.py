"""Answers read token by token: whole characters, stop texts, tool calls, and nothing that must be taken back."""

import json
from pathlib import Path

import pytest

from glm.errors import InputError
from glm.models import load_tokenizer
from glm.models.chat_encoding import encode_messages
from glm.models.chat_responses import chatglm1_response, chatglm2_response
from glm.models.chat_templates import CHAT_TEMPLATES
from glm.serving.answer import AnswerReader
from glm.serving.tools import ToolCall, read_call, template_messages, tool_format

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["你好，世界！", "hello 😀 龘 x", "一\n\n  二\t三  ", "🏳️‍🌈", "[[训练时间]]年", "[[训练", "a, b!\n", ""]


def tokenizer_of(generation: str):
    return load_tokenizer(GOLDEN / f"{generation}-e2e")


def read(reader: AnswerReader, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(reader.add(token))
        if reader.stopped:
            break
    return [*pieces, reader.finish()]


@pytest.mark.parametrize("generation", ["chatglm1", "chatglm2", "chatglm3"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(generation: str, text: str) -> None:
    tokenizer = tokenizer_of(generation)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    pieces = read(AnswerReader(tokenizer, raw=True), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    answer = "".join(read(AnswerReader(tokenizer), ids))
    response = chatglm1_response if generation == "chatglm1" else chatglm2_response
    assert answer == response(tokenizer.decode(ids))


def test_bytes_that_are_no_character_do_not_hold_the_text_back_for_ever() -> None:
    tokenizer = tokenizer_of("chatglm2")
    broken = tokenizer.convert_tokens_to_ids("<0xE4>")
    [good] = tokenizer.encode("好", add_special_tokens=False)[-1:]
    pieces = read(AnswerReader(tokenizer), [broken, good, *[broken] * 20, good])
    assert "".join(pieces) == "好好" and pieces[1] == "好"
    raw = read(AnswerReader(tokenizer, raw=True), [broken, good, *[broken] * 20, good])
    assert "".join(raw) == tokenizer.decode([broken, good, *[broken] * 20, good])
    assert sum(bool(piece) for piece in raw) > 3


def test_chatglm1_answers_get_full_width_marks_once_their_neighbours_are_known() -> None:
    tokenizer = tokenizer_of("chatglm1")
    for text in ("你好,世界!好", "a,世界 b,c 世界:"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(read(AnswerReader(tokenizer), ids)) == chatglm1_response(tokenizer.decode(ids))


def test_stop_texts_end_the_answer_and_never_show() -> None:
    tokenizer = tokenizer_of("chatglm2")
    ids = tokenizer.encode("第一点。第二点。END 第三点", add_special_tokens=False)
    for stop, want in (
        (("END",), "第一点。第二点。"),
        (("点。第", "二"), "第一"),
        (("没有",), "第一点。第二点。END 第三点"),
    ):
        reader = AnswerReader(tokenizer, stop)
        assert "".join(read(reader, ids)) == want
        assert reader.stopped == (stop != ("没有",))
    pieces = read(AnswerReader(tokenizer, ("ENDE",)), ids)  # begins like a stop text, and is none
    assert "".join(pieces) == "第一点。第二点。END 第三点"


CALLS = {
    "chatglm3": "weather\n ```python\ntool_call(city='北京', days=2)\n```",
    "glm4": 'weather\n{"city": "北京", "days": 2}',
}


@pytest.mark.parametrize("form", ["chatglm3", "glm4"])
def test_tool_calls_are_read_and_what_is_none_is_shown(form: str) -> None:
    tokenizer = tokenizer_of("chatglm3")
    ids = tokenizer.encode(CALLS[form], add_special_tokens=False)

    reader = AnswerReader(tokenizer, tool_format=form)
    assert "".join(read(reader, ids)) == ""
    assert reader.tool_calls == [ToolCall("weather", '{"city": "北京", "days": 2}')]

    reader = AnswerReader(tokenizer, tool_format=form)
    assert "".join(read(reader, ids[:-4])).startswith("weather\n") and reader.tool_calls == []

    thought = tokenizer.encode("\n 我查一下。", add_special_tokens=False)
    reader = AnswerReader(tokenizer, tool_format=form)
    pieces = read(reader, [*thought, tokenizer.convert_tokens_to_ids("<|assistant|>"), *ids])
    assert "".join(pieces) == "我查一下。" and pieces[-1] == "" and len(reader.tool_calls) == 1

    reader = AnswerReader(tokenizer, tool_format=form)
    assert "".join(read(reader, tokenizer.encode("你好", add_special_tokens=False))) == "你好"  # no first line at all


@pytest.mark.parametrize("content", ["", "[1]", "{", "```python\ntool_call(open('x'))\n```", "[" * 5000])
def test_no_call_is_made_of_anything_else(content: str) -> None:
    assert read_call("glm4", "t", content) is None
    assert read_call("chatglm3", "t", content) is None


def test_openai_messages_about_tools_become_what_the_model_has_seen() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    messages = [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "晴", "tool_call_id": "1"},
    ]
    tokenizer = tokenizer_of("chatglm3")
    assert tool_format(tokenizer) == "chatglm3"
    ids = encode_messages(tokenizer, template_messages("chatglm3", messages), add_generation_prompt=True).input_ids
    assert "weather\n ```python\ntool_call(city='北京')\n```<|observation|> \n 晴<|assistant|>" in tokenizer.decode(ids)
    [_, made, _] = template_messages("glm4", messages)
    assert (made["metadata"], json.loads(made["content"])) == ("weather", {"city": "北京"})
    with pytest.raises(InputError, match="message 2 is about a tool"):
        template_messages(None, messages)
    call["function"]["arguments"] = "[]"
    with pytest.raises(InputError, match="JSON object"):
        template_messages("glm4", messages)
    assert [tool_format(tokenizer_of(f"chatglm{n}")) for n in (1, 2)] == [None, None]
    assert set(CHAT_TEMPLATES) == {"chatglm1", "chatglm2", "chatglm3", "glm4"}
