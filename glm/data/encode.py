"""Rows → token ids by the model's chat template; labels on answers only.

Training, evaluation and chat all go through `glm.models.chat_encoding`, so that what a model is asked is what it
learned, and text from outside never becomes a control token.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from glm.config import Data
from glm.errors import InputError
from glm.models.chat_encoding import EncodedChat, encode_messages

IGNORED = -100  # the label that cross entropy leaves out
MARGIN = 32  # tokens by which a prompt on its own may be longer than as the beginning of its dialogue

Message = dict[str, str]
Row = dict[str, Any]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], params: Data) -> tuple[list[int], bool]:
    """Token ids of a dialogue up to where the answer starts, and whether it was cut to `params.max_source_length`."""
    messages = with_prefix(messages, params.source_prefix)
    whole = _render(tokenizer, messages)
    if len(whole) <= params.max_source_length:
        return whole, False
    return _render(tokenizer, fit(tokenizer, messages, params)), True


def dialogue(tokenizer: PreTrainedTokenizerBase, messages: list[Message], params: Data) -> dict[str, Any]:
    """A dialogue that ends with an answer: `input_ids`, `labels` (the answers and their ends), `truncated`.

    The prompt of the last answer keeps within `params.max_source_length`, that answer within
    `params.max_target_length`; an answer that is cut loses its end token too, since a model should not learn to stop in
    the middle of a sentence.
    """
    if whole := _uncut(tokenizer, messages, params):
        return whole
    fitted = fit(tokenizer, messages[:-1], params)
    longest = len(_render(tokenizer, fitted)) + params.max_target_length
    chat = encode_messages(tokenizer, [*fitted, messages[-1]])
    return {
        "input_ids": chat.input_ids[:longest],
        "labels": _labels(chat)[:longest],
        "truncated": len(chat.input_ids) > longest or fitted != with_prefix(messages[:-1], params.source_prefix),
    }


def rankings(tokenizer: PreTrainedTokenizerBase, row: Row, params: Data) -> dict[str, Any]:
    """A prompt with each of its ranked answers, best first.

    `sequences`, `starts` (where the answer begins in each of them), and whether one is `truncated`.
    """
    whole = [
        dialogue(tokenizer, [*row["prompt"], {"role": "assistant", "content": answer}], params)
        for answer in row["answers"]
    ]
    return {
        "sequences": [example["input_ids"] for example in whole],
        "starts": [answer_start(example["labels"]) for example in whole],
        "truncated": any(example["truncated"] for example in whole),
    }


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, params: Data) -> dict[str, Any]:
    """A prepared row (glm.data.contract) as token ids.

    sft: `input_ids`, `labels`. reward: `sequences`, `starts`. ppo: `input_ids` of the prompt. kto: `input_ids` and
    `labels` of prompt and answer, and its `label`. All: `truncated`.
    """
    if "messages" in row:
        return dialogue(tokenizer, row["messages"], params)
    if "answers" in row:
        return rankings(tokenizer, row, params)
    if "label" in row:
        messages = [*row["prompt"], {"role": "assistant", "content": row["answer"]}]
        return {**dialogue(tokenizer, messages, params), "label": row["label"]}
    ids, truncated = prompt_ids(tokenizer, row["prompt"], params)
    return {"input_ids": ids, "truncated": truncated}


def is_truncated(tokenizer: PreTrainedTokenizerBase, row: Row, params: Data) -> bool:
    """Whether encoding the row cuts it."""
    return encode_row(tokenizer, row, params)["truncated"]


def fit(tokenizer: PreTrainedTokenizerBase, messages: list[Message], params: Data) -> list[Message]:
    """The dialogue, system prompt included, cut so that its prompt keeps within `params.max_source_length` tokens.

    Whole old rounds go first; if the last question alone is too long, its middle goes. The system prompt, the
    question's head and tail, and the tokens that open the answer always survive (the reference cut the tail, and with
    it the question).

    Raises:
        InputError: not even an empty question fits.
    """
    messages = with_prefix(messages, params.source_prefix)
    system = messages[:1] if messages[0]["role"] == "system" else []
    rounds = messages[len(system) :]
    while len(_render(tokenizer, system + rounds)) > params.max_source_length:
        if len(rounds) <= 2:
            return [*system, _shorten(tokenizer, system, rounds[-1], params.max_source_length)]
        rounds = rounds[2:]
    return system + rounds


def with_prefix(messages: list[Message], source_prefix: str) -> list[Message]:
    """Put `source_prefix` before the dialogue as its system prompt, unless it brings its own."""
    if not source_prefix or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": source_prefix}, *messages]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token, so that answers cannot end")
    return tokenizer.eos_token_id


def _uncut(tokenizer: PreTrainedTokenizerBase, messages: list[Message], params: Data) -> dict[str, Any] | None:
    """The whole dialogue in one encoding if it is clearly within the limits, else None; spares most rows two more."""
    chat = encode_messages(tokenizer, with_prefix(messages, params.source_prefix))
    answer_at = bytes(chat.assistant_mask).rfind(0) + 1
    if not is_clearly_within(answer_at, len(chat.input_ids), params):
        return None
    return {"input_ids": chat.input_ids, "labels": _labels(chat), "truncated": False}


def answer_start(labels: list[int]) -> int:
    """Where the last answer of a dialogue begins."""
    return len(labels) - labels[::-1].index(IGNORED)


def is_clearly_within(answer_at: int, total: int, params: Data) -> bool:
    """Whether a dialogue of `total` tokens, whose last answer starts at `answer_at`, needs no cut.

    The prompt on its own may have a few tokens more or less than as the beginning of the dialogue: hence MARGIN.
    """
    return answer_at + MARGIN <= params.max_source_length and 0 < total - answer_at <= params.max_target_length - MARGIN


def _labels(chat: EncodedChat) -> list[int]:
    return [token if learned else IGNORED for token, learned in zip(chat.input_ids, chat.assistant_mask, strict=True)]


def _shorten(
    tokenizer: PreTrainedTokenizerBase, system: list[Message], question: Message, max_source_length: int
) -> Message:
    """The question without as much of its middle as must go, found by bisection over the characters kept."""
    text = question["content"]

    def kept(length: int) -> Message:
        return {**question, "content": text[: (length + 1) // 2] + text[len(text) - length // 2 :]}

    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(_render(tokenizer, [*system, kept(middle)])) <= max_source_length:
            low = middle
        else:
            high = middle - 1
    shortest = len(_render(tokenizer, [*system, kept(low)]))
    if shortest > max_source_length:
        raise InputError(
            f"data.max_source_length {max_source_length} is too small: template and system prompt alone take "
            f"{shortest} tokens"
        )
    return kept(low)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    return encode_messages(tokenizer, messages, add_generation_prompt=True).input_ids
