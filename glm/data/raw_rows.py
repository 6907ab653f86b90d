"""Fetched files of a dataset → rows in the shape of one use, each with its place, or with the reason why not.

`id` is "<dataset>:<file>:<row>", so that a prediction can be traced to the line it came from. Rows to which a converter
gives the same `group` share a split. A file that cannot be read, or holds no rows, counts as one broken row.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from glm.data import reviews
from glm.data.contract import UnusableError, validate
from glm.data.converters import CONVERTERS, TOLERANT
from glm.data.formats import from_csv, kind_of, names_of, to_use
from glm.data.readers import Raw, extension, read_file
from glm.data.registry import Entry
from glm.data.rows import Row, Use
from glm.errors import InputError

LONGEST_REASON = 200  # characters
FOLDER_FORMATS: dict[str, Callable[[Path], list[Row]]] = {
    "reviews_text": reviews.text_rows,
    "reviews_sft": reviews.sft_rows,
    "reviews_pairs": reviews.pair_rows,
    "reviews_prompts": reviews.prompt_rows,
}


class Read(NamedTuple):
    """What became of one raw row: its place, and a row in the shape of the use, or None and the reason."""

    id: str
    line: int | None
    row: Row | None
    reason: str = ""
    broken: bool = False
    """The file itself is at fault there: it does not parse."""


def read_rows(
    name: str, entry: Entry, folder: Path, use: Use, placeholders: Mapping[str, str] | None = None
) -> Iterator[Read]:
    """Yield what becomes of every raw row of a fetched dataset, in order.

    `placeholders` say what stands for each of the entry's: a text's <NAME> becomes what they have for NAME.

    Raises:
        InputError: the entry's format is unknown, it names a column that no row has, or a placeholder has no value.
    """
    entry.check_placeholders(name, placeholders or {})
    marks = {f"<{mark}>": (placeholders or {})[mark] for mark in entry.placeholders}
    if entry.format is not None and entry.format not in FOLDER_FORMATS | CONVERTERS:
        known = ", ".join(sorted(FOLDER_FORMATS | CONVERTERS))
        raise InputError(f"dataset {name!r}: unknown format {entry.format!r}; known: {known}")
    format_name = entry.format or PurePosixPath(entry.script_url or "").name
    sources: list[tuple[str, bool, Iterator[Raw]]]
    if format_name in FOLDER_FORMATS:
        rows = FOLDER_FORMATS[format_name](folder)
        sources = [(format_name, False, (Raw(at, None, row) for at, row in enumerate(rows, start=1)))]
    else:
        sources = [(path.name, extension(path) == ".csv", read_file(path)) for path in sorted(folder.iterdir())]
    convert = CONVERTERS.get(format_name)
    unseen = {column for column in (entry.columns or {}).values() if column}
    last: Row = {}
    for source, is_csv, raws in sources:
        for number, line, value, fault in raws:
            identity = f"{name}:{source}:{number}"
            if fault:
                yield Read(identity, line, None, fault, broken=format_name not in TOLERANT)
                continue
            try:
                if not isinstance(value, dict):
                    raise UnusableError(f"row is {kind_of(value)}, not an object")
                if is_csv:
                    value = from_csv(value, entry.columns, use)
                if convert:
                    value = convert(value)
                if marks:
                    value = filled(value, marks)
                last = value
                unseen -= value.keys()
                row = {"id": identity, **validate(use, to_use(value, entry.columns, use))}
                # A file's own column of that name means something else.
                group = {"group": value["group"]} if format_name in FOLDER_FORMATS and "group" in value else {}
                yield Read(identity, line, row | group)
            except UnusableError as reason:
                yield Read(identity, line, None, str(reason)[:LONGEST_REASON])
    if unseen and last:
        raise InputError(
            f"dataset {name!r}: its columns in dataset_info.json name {names_of(unseen)}, which no row has; rows have "
            f"{names_of(last)}"
        )


def filled(value: Any, marks: Mapping[str, str]) -> Any:
    """A row, or a part of one, with each mark in its texts replaced."""
    if isinstance(value, str):
        for mark, text in marks.items():
            value = value.replace(mark, text)
        return value
    if isinstance(value, list):
        return [filled(part, marks) for part in value]
    if isinstance(value, dict):
        return {key: filled(part, marks) for key, part in value.items()}
    return value
