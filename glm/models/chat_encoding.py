"""From messages to token ids, so that no message can become a control token.

A chat template renders a dialogue to one string, in which a user who types `<|assistant|>` looks like the template
that wrote it. Here every control token that comes from outside is marked before the template is rendered; afterwards
only unmarked ones become ids, and everything between them is encoded as plain text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import jinja2
from transformers import PreTrainedTokenizerBase, TokenizersBackend
from transformers.utils.chat_template_utils import render_jinja_template

from glm.errors import InputError

# Lone surrogates: no valid text holds one (`refuse_surrogates` sees to it), so the marks cannot be forged.
_START, _END = "\ud800", "\udbff"
_SURROGATES = re.compile("[\ud800-\udfff]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a dialogue and, for each of them, 1 if it is part of an answer to learn (else 0)."""

    input_ids: list[int]
    assistant_mask: list[int]


class TextEncoder(Protocol):
    """Encodes the text between control tokens."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` as plain text, whatever it spells."""

    def encode_text_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same with each id's span in the text's characters."""


@runtime_checkable
class ChatTokenizer(TextEncoder, Protocol):
    """A tokenizer that tells control tokens from text itself."""

    def control_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that a chat template may write and a text may not."""


def refuse_surrogates(text: str) -> None:
    """Raise InputError if `text` holds half of a surrogate pair, for which no tokenizer has a form."""
    if found := _SURROGATES.search(text):
        raise InputError(
            f"text holds a lone surrogate (U+{ord(found[0]):04X}) at character {found.start()}: it is not valid "
            "Unicode; decode the source with the right encoding or replace such characters"
        )


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> EncodedChat:
    """Encode one dialogue by the tokenizer's chat template; works for every tokenizer of `load_tokenizer`.

    The answer mask follows the template's `{% generation %}` blocks. Under a template without any, it covers the text
    that each assistant message adds to the prompt before it (nothing, where later messages change that text).

    Args:
        messages: dicts with `role`, `content` and whatever else the template reads.
        chat_template: used instead of the tokenizer's own.
        tools, add_generation_prompt, continue_final_message: as in transformers' `apply_chat_template`.
        variables: further variables of the template; control tokens in their values are text too.

    Raises:
        InputError: messages that the template refuses, text that is not valid Unicode, or a text that spells a
            control token while the tokenizer cannot encode it otherwise.
    """
    if not messages:
        raise InputError("an empty conversation has no prompt: give at least one message")
    if chat_template is None and tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template: name a prompt format (chat_template_name) or give one")
    fast = isinstance(tokenizer, TokenizersBackend)
    if not fast and not isinstance(tokenizer, ChatTokenizer):
        raise InputError(f"{type(tokenizer).__name__} is neither a fast tokenizer nor one of ChatGLM's")
    # Some vocabularies add runs of blanks as tokens; templates write those as text.
    tokens = _added_tokens(tokenizer) if fast else tokenizer.control_tokens()
    control = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    template = tokenizer.get_chat_template(chat_template, tools)
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    arguments = {
        "chat_template": template,
        "tools": _mark(tools, control),
        "continue_final_message": continue_final_message,
        # A name of the tokenizer's own tokens is the template's; whatever the caller passes is text.
        **tokenizer.special_tokens_map,
        **_mark(variables, control),
    }
    rendered, answers = _render(_mark(present, control), add_generation_prompt, arguments)
    flags = bytearray(len(rendered))
    for start, end in answers:
        flags[start:end] = b"\1" * (end - start)

    sections = list(_sections(rendered, bytes(flags), control))
    if not fast:
        return _encode_sections(tokenizer, sections, tokens)
    chat = (
        _encode_sections(_FastTextEncoder(tokenizer, tokens), sections, tokens)
        if _START in rendered
        else _encode_whole(tokenizer, rendered, bytes(flags))
    )
    watched = set(tokens.values()) - {tokenizer.unk_token_id}  # unknown text is no injection
    written = [tokens[text] for text, _, is_control in sections if is_control and tokens[text] in watched]
    if [token_id for token_id in chat.input_ids if token_id in watched] != written:
        raise InputError("a message holds text that this tokenizer turns into a control token: remove it")
    return chat


def _render(
    messages: list[dict[str, Any]], add_generation_prompt: bool, arguments: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The dialogue as one string with marks, and the answers' spans in it."""
    tracked = bool(_GENERATION.search(arguments["chat_template"])) and not arguments["continue_final_message"]

    def render(part: list[dict[str, Any]], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            [text], spans = render_jinja_template(
                conversations=[part],
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=tracked,
                **arguments,
            )
        except (jinja2.TemplateError, ValueError) as error:
            reason = " ".join(str(error).replace(_START, "").replace(_END, "").split())
            raise InputError(f"the chat template refuses the messages: {reason[:300]}") from error
        return text, spans[0] if spans else []

    text, spans = render(messages, add_generation_prompt)
    if tracked or arguments["continue_final_message"]:
        return text, spans
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            before, _ = render(messages[:i], True)
            after, _ = render(messages[: i + 1], False)
            if after.startswith(before) and text.startswith(after):
                spans.append((len(before), len(after)))
    return text, spans


def _mark(value: Any, control: re.Pattern[str]) -> Any:
    """Put every control token in `value`'s strings between marks."""
    if isinstance(value, str):
        refuse_surrogates(value)
        return control.sub(f"{_START}\\g<0>{_END}", value)
    if isinstance(value, Mapping):
        return {_mark(key, control): _mark(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(item, control) for item in value]
    if value is None or isinstance(value, int | float):
        return value
    raise InputError(f"a chat is made of strings, numbers, lists and dicts; found {type(value).__name__}")


def _sections(rendered: str, flags: bytes, control: re.Pattern[str]) -> Iterator[tuple[str, bytes, bool]]:
    """Cut at the template's own control tokens: (text, answer flag per character, is a control token)."""
    text, text_flags = "", b""
    position = 0
    for found in re.finditer(f"{_START}({control.pattern}){_END}|({control.pattern})|[{_START}{_END}]", rendered):
        text += rendered[position : found.start()]
        text_flags += flags[position : found.start()]
        position = found.end()
        if found[2] is not None:
            if text:
                yield text, text_flags, False
            yield found[0], flags[found.start() : found.end()], True
            text, text_flags = "", b""
        elif found[1] is not None:
            text += found[1]
            text_flags += flags[found.start(1) : found.end(1)]
    if text + rendered[position:]:
        yield text + rendered[position:], text_flags + flags[position:], False


def _encode_sections(
    encoder: TextEncoder, sections: list[tuple[str, bytes, bool]], tokens: dict[str, int]
) -> EncodedChat:
    ids: list[int] = []
    mask: list[int] = []
    for text, flags, is_control in sections:
        if is_control:
            ids.append(tokens[text])
            mask.append(flags[0])
        elif flags.count(flags[0]) == len(flags):
            text_ids = encoder.encode_text(text)
            ids += text_ids
            mask += [flags[0]] * len(text_ids)
        else:
            text_ids, spans = encoder.encode_text_with_spans(text)
            ids += text_ids
            mask += _mask_of(spans, flags)
    return EncodedChat(ids, mask)


def _encode_whole(tokenizer: PreTrainedTokenizerBase, rendered: str, flags: bytes) -> EncodedChat:
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    return EncodedChat(encoded["input_ids"], _mask_of(encoded["offset_mapping"], flags))


def _mask_of(spans: list[tuple[int, int]], flags: bytes) -> list[int]:
    # A token that also covers text outside the answer cannot be predicted where the answer starts: not labelled.
    # (In byte fallback a character's first bytes have an empty span; its last byte covers it.)
    return [int(all(flags[start : max(end, start + 1)])) for start, end in spans]


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {token: token_id for token, token_id in tokenizer.get_added_vocab().items() if token.strip()}


class _FastTextEncoder:
    """Plain text for a fast tokenizer. `split_special_tokens` leaves special tokens that the text spells as text; an
    added token that is not special is cut in two, so that it cannot match."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int]) -> None:
        self._tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._ordinary = re.compile("|".join(re.escape(token) for token in tokens if token not in special) or "(?!)")
        token = next(iter(tokens))
        apart = [*self.encode_text("a b"), tokens[token], *self.encode_text("a b")]
        if tokenizer(f"a b{token}a b", add_special_tokens=False)["input_ids"] != apart:
            raise InputError(
                "a message spells a control token, and this tokenizer cannot encode it as text: remove it from the text"
            )

    def encode_text(self, text: str) -> list[int]:
        return self.encode_text_with_spans(text)[0]

    def encode_text_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        cuts = [0, *(found.start() + 1 for found in self._ordinary.finditer(text)), len(text)]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, end in pairwise(cuts):
            encoded = self._tokenizer(
                text[start:end], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            ids += encoded["input_ids"]
            spans += [(start + a, start + b) for a, b in encoded["offset_mapping"]]
        return ids, spans
