"""Files → raw rows with the place they stand at, read as a stream: memory holds one row and one block of the file.

json (a list, or one object a line, as many `.json` files of the hub are), jsonl, csv, parquet and txt (a row a line);
all but parquet also as .gz and .zst. A row that does not parse is handed on with its fault, so that the caller decides
whether to stop or to go on counting.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from glm.errors import InputError

EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
BLOCK = 1 << 20  # characters
LONGEST_ROW = 1 << 26  # characters of one row of a json list; an unclosed quote must not pull in the whole file
LITERAL = 16  # characters: more than any escape or literal that a block's end may cut in two
CSV_FIELD = 1 << 30
_BLANK = re.compile(r"\s*")
_UNDECODED = re.compile("[\udc80-\udcff]")
NOT_UTF8 = "not UTF-8 text"


class Raw(NamedTuple):
    """A row as it stands in a file: its number (the line where a row is a line), its line, and its value or fault."""

    number: int
    line: int | None
    value: Any
    fault: str = ""


def extension(path: Path) -> str:
    """The extension that says what is inside: `.jsonl` of `rows.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def is_readable(path: Path) -> bool:
    """Whether `read_file` knows the file by its name."""
    return extension(path) in EXTENSIONS and not (path.suffix in COMPRESSIONS and extension(path) == ".parquet")


def read_file(path: Path) -> Iterator[Raw]:
    """Yield the raw rows of a file in their order. The first fault of a list, csv or parquet file ends it.

    Raises:
        InputError: the name does not say what is inside.
    """
    if not is_readable(path):
        raise InputError(
            f"{path.name}: rows are read from {', '.join(EXTENSIONS)}; all but .parquet may also end in "
            f"{' or '.join(COMPRESSIONS)}"
        )
    kind = extension(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with _open(path) as file:
        try:
            if kind == ".json":
                text = _text(file)
                head = text.read(BLOCK)
                if head[_BLANK.match(head).end() :].startswith("["):  # type: ignore[union-attr]
                    yield from _json_list(text, head)
                    return
        except (OSError, EOFError) as error:
            yield Raw(0, None, None, _unreadable(error))
            return
    with _open(path) as file:
        try:
            if kind == ".csv":
                yield from _csv(_text(file))
            elif kind == ".txt":
                yield from _text_lines(file)
            else:
                yield from _json_lines(file)
        except (OSError, EOFError) as error:
            yield Raw(0, None, None, _unreadable(error))


def _open(path: Path) -> BinaryIO:
    if path.suffix in COMPRESSIONS:
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path)), BLOCK)  # its suffix says how it is compressed
    return open(path, "rb")


def _text(file: BinaryIO) -> TextIO:
    """Decode a file; bytes that are not UTF-8 become lone surrogates, so that the row that holds them can be named."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_lines(file: BinaryIO) -> Iterator[Raw]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield Raw(number, number, json.loads(line))
        except json.JSONDecodeError as error:
            yield Raw(number, number, None, f"not valid JSON: {error.msg} (expected a list of rows, or one a line)")
        except (UnicodeDecodeError, RecursionError) as error:
            yield Raw(number, number, None, _unreadable(error))


def _text_lines(file: BinaryIO) -> Iterator[Raw]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            yield Raw(number, number, None, _unreadable(error))
            continue
        if text:
            yield Raw(number, number, {"text": text})


def _csv(file: TextIO) -> Iterator[Raw]:
    csv.field_size_limit(CSV_FIELD)
    reader = csv.DictReader(file, strict=True)
    line = 1
    try:
        line = (reader.fieldnames and reader.line_num + 1) or 1
        for row in reader:
            if None in row:
                yield Raw(line, line, None, f"more fields than the header's {len(reader.fieldnames or ())}")
            elif None in row.values():
                yield Raw(line, line, None, f"fewer fields than the header's {len(reader.fieldnames or ())}")
            elif any(map(_UNDECODED.search, row.values())):
                yield Raw(line, line, None, NOT_UTF8)
            else:
                yield Raw(line, line, row)
            line = reader.line_num + 1
    except csv.Error as error:
        yield Raw(line, line, None, f"not valid CSV: {error}")


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield Raw(number, None, row)
    except (pyarrow.ArrowException, OSError) as error:
        yield Raw(0, None, None, f"not valid Parquet: {error}")


def _json_list(file: TextIO, text: str) -> Iterator[Raw]:
    """The values of one long JSON list, decoded one by one."""
    decoder = json.JSONDecoder()
    line, at, number = 1, text.index("[") + 1, 0
    line += text.count("\n", 0, at)
    start = at

    def more() -> bool:
        nonlocal text, at, start
        block = file.read(max(BLOCK, len(text) - at))
        if block:
            text, at, start = text[at:] + block, 0, 0
        return bool(block)

    def skip_blanks() -> str:
        """Move to the next character that is not blank, count lines, and return it ("" at the end)."""
        nonlocal at, line, start
        while True:
            at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
            line += text.count("\n", start, at)
            start = at
            if at < len(text):
                return text[at]
            if not more():
                return ""

    if skip_blanks() == "]":
        return
    while True:
        try:
            value, end = decoder.raw_decode(text, at)
            if end >= len(text) - 1 and more():  # a number may go on in the next block
                continue
        except RecursionError as error:
            yield Raw(number + 1, line, None, _unreadable(error))
            return
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - LITERAL
            if cut and len(text) - at < LONGEST_ROW and more():
                continue
            fault_line = line + text.count("\n", at, error.pos)
            yield Raw(number + 1, fault_line, None, f"not valid JSON: {error.msg}")
            return
        number += 1
        if _UNDECODED.search(text, at, end):
            yield Raw(number, line, None, NOT_UTF8)
        else:
            yield Raw(number, line, value)
        at = end
        delimiter = skip_blanks()
        if delimiter == "]":
            return
        if delimiter != ",":
            fault = "the list does not end" if not delimiter else f"expected , or ] and found {delimiter!r}"
            yield Raw(number + 1, line, None, f"not valid JSON: {fault}")
            return
        at += 1
        start = at
        skip_blanks()


def _unreadable(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{NOT_UTF8} ({error.reason} at byte {error.start} of the line)"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"cannot be read: {error}"
