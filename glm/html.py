"""Pages that need nothing beside them: one HTML file with its style, tables and pictures inside."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .15rem .8rem .15rem 0; text-align: left }
td { vertical-align: top } td.number { text-align: right; font-variant-numeric: tabular-nums }
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
    """A table of text; whole numbers are grouped by thousands and stand right."""

    def cell(value: Any) -> str:
        if isinstance(value, int):
            return f"<td class='number'>{value:,}</td>"
        return f"<td>{escape(str(value))}</td>"

    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def picture(address: str, title: str) -> str:
    """An image; `address` is a data: URL, so that the page stays one file."""
    return f"<figure><img src='{address}' alt='{escape(title)}'></figure>"
