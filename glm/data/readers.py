"""Files → raw rows with the place they stand at, read as a stream: memory holds one row and one block of the file.

json and jsonl (either name for a list, or for one object a line), csv, parquet and txt (a row a line); all but parquet
also as .gz and .zst. A row that does not parse is handed on with its fault, so that the caller decides whether
to stop or to go on counting; where a fault hides what follows, it says so. A file without rows is a fault too.
"""

import csv
import io
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from glm.errors import InputError

EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
BLOCK = 1 << 20  # characters
BUFFER = 1 << 20  # bytes
LONGEST_ROW = 1 << 26  # characters or bytes of one row; an unclosed quote must not pull in the whole file
LITERAL = 16  # characters: more than any escape or literal that a block's end may cut in two
_BLANK = re.compile(r"\s*")
_UNDECODED = re.compile("[\udc80-\udcff]")
NOT_UTF8 = "not UTF-8 text"
REST = "; the rest of the file is not read"
OTHER_KINDS = {  # how a file begins that is not what its name says
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
    b"\x1f\x8b": "gzip data: its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd data: its name must end in .zst",
    b"PAR1": "Parquet data: its name must end in .parquet",
    b"PK\x03\x04": "a zip or Excel file: unpack it, or save it as CSV in UTF-8",
    b"version https://git-lfs": "a pointer of git LFS: `git lfs pull` brings the file itself",
}


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
    """Yield the raw rows of a file in their order, and its faults.

    Raises:
        InputError: the name does not say what is inside.
    """
    if not is_readable(path):
        raise InputError(
            f"{path.name}: rows are read from {', '.join(EXTENSIONS)}; all but .parquet may also end in "
            f"{' or '.join(COMPRESSIONS)}"
        )
    empty = True
    for raw in _parquet(path) if extension(path) == ".parquet" else _text_file(path):
        empty = False
        yield raw
    if empty:
        yield Raw(0, None, None, "the file holds no rows")


def _text_file(path: Path) -> Iterator[Raw]:
    kind = extension(path)
    try:
        with _open(path) as file:
            head = file.peek(LITERAL)
            for beginning, what in OTHER_KINDS.items():
                if head.startswith(beginning):
                    yield Raw(0, None, None, f"not a {kind} file but {what}")
                    return
            if kind == ".csv":
                yield from _csv(_text(file))
            elif kind == ".txt":
                yield from _text_lines(file)
            elif head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                yield from _json_list(_text(file))
            else:
                yield from _json_lines(file)
    except (OSError, EOFError) as error:
        yield Raw(0, None, None, f"cannot be read: {error}")


def _open(path: Path) -> io.BufferedReader:
    if path.suffix in COMPRESSIONS:
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path)), BUFFER)  # its suffix says how it is compressed
    return io.BufferedReader(io.FileIO(path), BUFFER)


def _text(file: BinaryIO) -> TextIO:
    """Decode a file; bytes that are not UTF-8 become lone surrogates, so that the row that holds them can be named."""
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_lines(file: BinaryIO) -> Iterator[Raw]:
    for number, text, fault in _lines(file):
        if fault:
            yield Raw(number, number, None, fault)
            continue
        try:
            yield Raw(number, number, json.loads(text))
        except (ValueError, RecursionError) as error:
            yield Raw(number, number, None, f"{_not_json(error)} (expected a list of rows, or one a line)")


def _text_lines(file: BinaryIO) -> Iterator[Raw]:
    for number, text, fault in _lines(file):
        yield Raw(number, number, None if fault else {"text": text}, fault)


def _lines(file: BinaryIO) -> Iterator[tuple[int, str, str]]:
    """(number, text, fault) of every line that is not blank."""
    number = 0
    while line := file.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
            yield number, "", f"longer than {LONGEST_ROW:,} bytes{REST}"
            return
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, "", f"{NOT_UTF8} ({error.reason} at byte {error.start + 1} of the line): convert the file"
            continue
        if text:
            yield number, text, ""


def _csv(file: TextIO) -> Iterator[Raw]:
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(file, strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if not fields:  # a blank line
                pass
            elif not header:
                header = fields
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    yield Raw(0, line, None, f"the header names {twice[0]!r} twice{REST}")
                    return
            elif len(fields) != len(header):
                yield Raw(line, line, None, f"{len(fields)} fields, the header has {len(header)}")
            elif any(map(_UNDECODED.search, fields)):
                yield Raw(line, line, None, f"{NOT_UTF8}: convert the file")
            else:
                yield Raw(line, line, dict(zip(header, fields, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        yield Raw(line, line, None, f"not valid CSV: {error}{REST}")


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield Raw(number, None, row)
    except (pyarrow.ArrowException, OSError) as error:
        yield Raw(0, None, None, f"not valid Parquet: {' '.join(str(error).split())}")


def _json_list(file: TextIO) -> Iterator[Raw]:
    """The values of one long JSON list, decoded one by one."""
    decoder = json.JSONDecoder()
    text = file.read(BLOCK)
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

    def after_list() -> Iterator[Raw]:
        nonlocal at
        at += 1
        if rest := skip_blanks():
            yield Raw(number + 1, line, None, f"not valid JSON: the list has ended, but {rest!r} follows{REST}")

    if skip_blanks() == "]":
        yield from after_list()
        return
    while True:
        try:
            value, end = decoder.raw_decode(text, at)
            if end >= len(text) - 1 and more():  # a number may go on in the next block
                continue
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - LITERAL
            if cut and len(text) - at < LONGEST_ROW and more():
                continue
            fault_line = line + text.count("\n", at, error.pos)
            yield Raw(number + 1, fault_line, None, f"{_not_json(error)}{REST}")
            return
        except (ValueError, RecursionError) as error:
            yield Raw(number + 1, line, None, f"{_not_json(error)}{REST}")
            return
        number += 1
        if _UNDECODED.search(text, at, end):
            yield Raw(number, line, None, f"{NOT_UTF8}: convert the file")
        else:
            yield Raw(number, line, value)
        at = end
        delimiter = skip_blanks()
        if delimiter == "]":
            yield from after_list()
            return
        if delimiter != ",":
            fault = "the list does not end" if not delimiter else f"expected , or ] and found {delimiter!r}"
            yield Raw(number + 1, line, None, f"not valid JSON: {fault}{REST}")
            return
        at += 1
        start = at
        skip_blanks()


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"not valid JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"
