"""Rows → token ids by the model's chat template; labels on answers only.

Training, evaluation and chat all go through `glm.models.chat_encoding`, so that what a model is asked is what it
learned, and text from outside never becomes a control token.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from glm.config import Data
from glm.errors import InputError
from glm.models.chat_encoding import encode_messages

IGNORED = -100  # the label that cross entropy leaves out

Message = dict[str, str]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], params: Data) -> tuple[list[int], bool]:
    """Token ids of a dialogue up to where the answer starts, and whether it was cut to `params.max_source_length`."""
    fitted = fit(tokenizer, messages, params)
    return _render(tokenizer, fitted), fitted != with_prefix(messages, params.source_prefix)


def dialogue(tokenizer: PreTrainedTokenizerBase, messages: list[Message], params: Data) -> dict[str, Any]:
    """A dialogue that ends with an answer: `input_ids`, `labels` (the answers and their ends), `truncated`.

    The prompt of the last answer keeps within `params.max_source_length`, that answer within
    `params.max_target_length`; an answer that is cut loses its end token too, since a model should not learn to stop in
    the middle of a sentence.
    """
    fitted = fit(tokenizer, messages[:-1], params)
    longest = len(_render(tokenizer, fitted)) + params.max_target_length
    chat = encode_messages(tokenizer, [*fitted, messages[-1]])
    labels = [token if learned else IGNORED for token, learned in zip(chat.input_ids, chat.assistant_mask, strict=True)]
    return {
        "input_ids": chat.input_ids[:longest],
        "labels": labels[:longest],
        "truncated": len(chat.input_ids) > longest or fitted != with_prefix(messages[:-1], params.source_prefix),
    }


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
