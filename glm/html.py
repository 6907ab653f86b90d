"""Pages that need nothing beside them: one HTML file with its style, tables and pictures inside."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

NUMBER = re.compile(r"(-?[\d,.]+(:\d\d)*)?")  # 1,234 or 0.5 or 1:23, or nothing

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .15rem .8rem .15rem 0; text-align: left }
td { vertical-align: top } .number { text-align: right; font-variant-numeric: tabular-nums }
th { color: #666; font-weight: 500 } img { max-width: 100% }
.figures { display: flex; flex-wrap: wrap; gap: 2rem } figure { margin: 0 } figcaption { color: #666 }
code { background: #f4f4f4; padding: 0 .2rem } .note { color: #666 }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page. `parts` are HTML already; the title is text."""
    return "\n".join(
        [
            "<!doctype html>",
            f"<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body></html>",
            "",
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of text. Columns of numbers and times stand right; whole numbers are grouped by thousands."""
    cells = [[f"{value:,}" if isinstance(value, int) else str(value) for value in row] for row in rows]
    right = [all(NUMBER.fullmatch(cell) for cell in column) for column in zip(*cells, strict=True)]

    def line(tag: str, row: Sequence[str]) -> str:
        kinds = [" class='number'" if number else "" for number in right or [False] * len(row)]
        parts = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    return "\n".join([f"<table>{line('th', head)}", *(line("td", row) for row in cells), "</table>"])


def picture(address: str, title: str) -> str:
    """An image; `address` is a data: URL, so that the page stays one file."""
    return f"<figure><img src='{address}' alt='{escape(title)}'></figure>"
