"""From the tokens of an answer to what the user sees, piece by piece: whole characters, no stop text, tool calls apart.

What is handed out never has to be taken back: the pieces of an answer, put together, are the answer.
"""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from glm.models.chat_responses import chatglm1_response, chatglm2_response
from glm.models.tokenization_chatglm1 import ChatGLM1Tokenizer
from glm.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from glm.serving.tools import ToolCall, ToolFormat, read_call

BROKEN = "\ufffd"  # what decoders write for bytes that are not a whole character (yet)
LONGEST_CHARACTER = 4  # bytes, and tokens where a tokenizer falls back to bytes
YEAR_MARK = "[[训练时间]]"  # see chat_responses


class Detokenizer:
    """Text of one token after the other, held back while a character is incomplete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = 0  # a token decodes differently at the beginning: the last piece's tokens stand before it
        self.read = 0  # tokens whose text has been handed out

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.tokens.append(token)
        return self._text(final=False)

    def rest(self) -> str:
        """What is still held back, at the end."""
        return self._text(final=True)

    def _text(self, final: bool) -> str:
        before = self._decode(self.tokens[self.start : self.read])
        text = self._decode(self.tokens[self.start :])
        waiting = len(self.tokens) - self.read
        if text.endswith(BROKEN) and not final and waiting < 2 * LONGEST_CHARACTER:
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class AnswerReader:
    """Reads one answer.

    With a `tool_format` (a generation that calls tools, and a request that offered some), the answer is a series of
    messages, each with a first line that is empty or names a tool; calls are collected in `tool_calls`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...] = (),
        *,
        tool_format: ToolFormat | None = None,
        raw: bool = False,
    ) -> None:
        """`raw` leaves blanks at both ends, and the text as the model wrote it (for plain continuations)."""
        self.tokenizer = tokenizer
        self.stop = stop
        self.tool_format = tool_format
        self.raw = raw
        self.stopped = False  # a stop text was found
        self.tool_calls: list[ToolCall] = []
        self.text = ""  # of the answer, as far as decoded
        self._given = 0  # characters handed out
        self._head: str | None = "" if tool_format else None  # a message's first line, while it is incomplete
        self._call: tuple[str, str] | None = None  # name and content of a tool call under way
        self._detokenizer = Detokenizer(tokenizer)
        self._next_message = tokenizer.convert_tokens_to_ids("<|assistant|>") if tool_format else None
        self._clean = _cleaner(tokenizer, raw)

    def add(self, token: int) -> str:
        """Take a token that does not end the answer; returns the text that is certain now."""
        if token == self._next_message:
            self._take(self._detokenizer.rest())
            self._close_message()
            self._head = ""
            self._detokenizer = Detokenizer(self.tokenizer)
        else:
            self._take(self._detokenizer.add(token))
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the text, once no token will follow."""
        if not self.stopped:
            self._take(self._detokenizer.rest())
            self._close_message()
        return self._release(final=True)

    def _take(self, piece: str) -> None:
        if self._head is not None:
            self._head += piece
            name, newline, piece = self._head.partition("\n")
            if not newline:
                return
            self._head = None
            self._call = (name.strip(), "") if name.strip() else None
        if self._call is not None:
            self._call = (self._call[0], self._call[1] + piece)
        else:
            self.text += piece

    def _close_message(self) -> None:
        if self._head:
            self.text += self._head
        if self._call is not None and self.tool_format:
            name, content = self._call
            call = read_call(self.tool_format, name, content)
            if call is None:  # cut short, or no call at all: the user sees what the model wrote
                self.text += f"{name}\n{content}"
            else:
                self.tool_calls.append(call)
        self._head = self._call = None

    def _release(self, final: bool) -> str:
        found = [place for place in (self.text.find(stop) for stop in self.stop) if place >= 0]
        if found and not self.stopped:
            self.text = self.text[: min(found)]
            self.stopped = True
        text = self._clean(self.text)
        if not self.raw:
            text = text.lstrip()
        end = len(text)
        if not (final or self.stopped):
            end -= _held(self.text, self.stop if self.raw else (*self.stop, YEAR_MARK))
            if isinstance(self.tokenizer, ChatGLM1Tokenizer):
                end = min(end, len(text) - 1)  # the next character decides about the width of a punctuation mark
        if not self.raw:
            end = min(end, len(text.rstrip()))
        given, self._given = self._given, max(self._given, end)
        return text[given:end]


def _held(text: str, watched: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that may be the beginning of one of the watched texts."""
    longest = max(map(len, watched), default=0)
    for length in range(min(len(text), longest - 1), 0, -1):
        if any(word.startswith(text[-length:]) for word in watched):
            return length
    return 0


def _cleaner(tokenizer: PreTrainedTokenizerBase, raw: bool) -> Callable[[str], str]:
    """The authors' own last touch to an answer; blanks are left to the reader."""
    if raw:
        return lambda text: text
    authors: Callable[[str], str] = str
    if isinstance(tokenizer, ChatGLM1Tokenizer):
        authors = chatglm1_response
    elif isinstance(tokenizer, ChatGLM2Tokenizer):
        authors = chatglm2_response
    # They strip, but blanks at the end are not the end yet: a mark stands behind them. Broken bytes are left out.
    return lambda text: authors(text.replace(BROKEN, "") + "|")[:-1]
