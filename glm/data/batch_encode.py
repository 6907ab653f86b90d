"""The encoder of `glm.data.encode` for many rows: the same ids, several times as fast for ChatGLM2 and 3.

`encode_messages` renders the chat template for every row and asks for the place of every token. Here the template is
rendered once for every sequence of roles, with marks in the place of the messages; a row then only fills its texts in,
and where an answer begins is counted in bytes. A row goes the long way where that might give something else: another
tokenizer, a template that is not this project's, a text that spells a control token, a dialogue near the limits.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from glm.config import Data
from glm.data.encode import IGNORED, Message, Row, answer_start, encode_row, is_clearly_within, with_prefix
from glm.models.chat_templates import CHATGLM2, CHATGLM3
from glm.models.tokenization_chatglm2 import ChatGLM2Tokenizer

Example = dict[str, Any]
_MARK = re.compile("\ue000(\\d+)\ue001")  # private use: no template holds them


class _Control(NamedTuple):
    """A control token of a template, and whether it is learned."""

    token: int
    learned: bool


class _Blank(NamedTuple):
    """A text between two control tokens, to be filled in."""

    parts: list[str | int]
    """Texts of the template, and the numbers of messages."""
    learned: list[tuple[int, int]]
    """Runs of parts that are learned: from, to (exclusive)."""


class _Section(NamedTuple):
    """A text between two control tokens, and which characters of it are learned."""

    text: str
    learned: list[tuple[int, int]]


class RowEncoder:
    """Encodes prepared rows as `glm.data.encode.encode_row` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: Data) -> None:
        self.tokenizer = tokenizer
        self.params = params
        # Their templates take a message as it is, whatever it says.
        self.is_fast = isinstance(tokenizer, ChatGLM2Tokenizer) and tokenizer.chat_template in (CHATGLM2, CHATGLM3)
        self.patterns: dict[tuple[str, ...], list[_Control | _Blank]] = {}
        if self.is_fast:
            self.controls: dict[str, int] = tokenizer.control_tokens()
            spellings = "|".join(map(re.escape, sorted(self.controls, key=len, reverse=True)))
            self.control = re.compile(spellings)
            self.unfit = re.compile(f"{spellings}|[\ud800-\udfff\ue000\ue001]")
            pieces = tokenizer.sp_model
            self.sizes = [_bytes_of(pieces, at) for at in range(pieces.get_piece_size())]

    def __call__(self, rows: list[Row]) -> list[Example]:
        """Token ids of rows; see `encode_row`."""
        if not self.is_fast:
            return [encode_row(self.tokenizer, row, self.params) for row in rows]
        filled = [[self._fill(dialogue) for dialogue in _dialogues(row)] for row in rows]
        texts = [
            part.text
            for dialogues in filled
            for parts in dialogues
            for part in parts or ()
            if isinstance(part, _Section)
        ]
        encoded = iter(self.tokenizer.sp_model.encode(texts, num_threads=1))
        out = []
        for row, dialogues in zip(rows, filled, strict=True):
            sequences = [self._join(parts, encoded) if parts else None for parts in dialogues]
            out.append(self._example(row, sequences) or encode_row(self.tokenizer, row, self.params))
        return out

    def _example(self, row: Row, sequences: list[tuple[list[int], list[int]] | None]) -> Example | None:
        """A row by the ids and labels of its dialogues; None if one has to go the long way."""
        is_prompt = not row.keys() & {"messages", "answers", "label"}
        starts = []
        for sequence in sequences:
            if sequence is None:
                return None
            ids, labels = sequence
            if is_prompt:
                return {"input_ids": ids, "truncated": False} if len(ids) <= self.params.max_source_length else None
            starts.append(answer_start(labels))
            if not is_clearly_within(starts[-1], len(ids), self.params):
                return None
        if "answers" in row:
            whole = [sequence[0] for sequence in sequences if sequence]
            return {"sequences": whole, "starts": starts, "truncated": False}
        example = {"input_ids": ids, "labels": labels, "truncated": False}
        return {**example, "label": row["label"]} if "label" in row else example

    def _fill(self, messages: list[Message]) -> list[_Control | _Section] | None:
        """The template filled with messages; None if one of them has to go the long way."""
        messages = with_prefix(messages, self.params.source_prefix)
        contents = [message["content"] for message in messages]
        if any(not content or self.unfit.search(content) for content in contents):
            return None
        roles = tuple(message["role"] for message in messages)
        if roles not in self.patterns:
            self.patterns[roles] = self._pattern(roles)
        filled: list[_Control | _Section] = []
        for item in self.patterns[roles]:
            if isinstance(item, _Control):
                filled.append(item)
                continue
            texts = [contents[part] if isinstance(part, int) else part for part in item.parts]
            starts = list(accumulate(map(len, texts), initial=0)) if item.learned else []
            filled.append(_Section("".join(texts), [(starts[first], starts[last]) for first, last in item.learned]))
        return filled

    def _join(
        self, parts: list[_Control | _Section], encoded: Iterator[list[int]]
    ) -> tuple[list[int], list[int]] | None:
        """Ids and labels of a filled template; takes its sections' ids from `encoded`."""
        ids: list[int] = []
        labels: list[int] = []
        spelled = True
        for part in parts:
            if isinstance(part, _Control):
                ids.append(part.token)
                labels.append(part.token if part.learned else IGNORED)
                continue
            section = next(encoded)
            ids += section
            if not part.learned:
                labels += [IGNORED] * len(section)
                continue
            # Where each token starts, and behind them where the last one ends. The word mark that the tokenizer puts
            # in front of a text has no place in it: it stands before byte 0.
            starts = list(accumulate(map(self.sizes.__getitem__, section), initial=-1))
            spelled &= starts[-1] == len(part.text.encode())
            mine = [IGNORED] * len(section)
            for start, end in part.learned:
                first = bisect_left(starts, len(part.text[:start].encode())) if start else 0
                last = bisect_right(starts, len(part.text[:end].encode())) - 1
                mine[first:last] = section[first:last]
            labels += mine
        return (ids, labels) if spelled else None

    def _pattern(self, roles: tuple[str, ...]) -> list[_Control | _Blank]:
        """The template for one sequence of roles; a dialogue that ends with a question is a prompt."""
        [text], [spans] = render_jinja_template(
            conversations=[[{"role": role, "content": f"\ue000{at}\ue001"} for at, role in enumerate(roles)]],
            chat_template=self.tokenizer.chat_template,
            add_generation_prompt=roles[-1] == "user",
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        flags = bytearray(len(text))
        for start, end in spans:
            flags[start:end] = b"\1" * (end - start)
        bounds = {0, len(text), *(at for at in range(1, len(text)) if flags[at] != flags[at - 1])}
        for found in [*self.control.finditer(text), *_MARK.finditer(text)]:
            bounds |= {found.start(), found.end()}
        pattern: list[_Control | _Blank] = []
        blank: _Blank | None = None
        for start, end in pairwise(sorted(bounds)):
            part, learned = text[start:end], bool(flags[start])
            if part in self.controls:
                pattern.append(_Control(self.controls[part], learned))
                blank = None
                continue
            if blank is None:
                blank = _Blank([], [])
                pattern.append(blank)
            at = len(blank.parts)
            mark = _MARK.fullmatch(part)
            blank.parts.append(int(mark[1]) if mark else part)
            if learned and blank.learned and blank.learned[-1][1] == at:
                blank.learned[-1] = (blank.learned[-1][0], at + 1)
            elif learned:
                blank.learned.append((at, at + 1))
        return pattern


def _dialogues(row: Row) -> list[list[Message]]:
    """The dialogues of a row: each of its answers after the prompt, or the prompt alone."""
    if "messages" in row:
        return [row["messages"]]
    answers = row["answers"] if "answers" in row else [row["answer"]] if "label" in row else None
    if answers is None:
        return [row["prompt"]]
    return [[*row["prompt"], {"role": "assistant", "content": answer}] for answer in answers]


def _bytes_of(pieces: Any, at: int) -> int:
    """Bytes of text that a piece stands for."""
    if pieces.is_byte(at):
        return 1
    if pieces.is_control(at) or pieces.is_unknown(at):
        return 0
    return len(pieces.id_to_piece(at).replace("▁", " ").encode())
