"""The preprocessing report as one HTML page that needs nothing beside it: tables, and bars drawn as SVG."""

from html import escape
from typing import Any

from glm.html import document, table

BAR, GAP, LABELS, WIDTH = 16, 4, 110, 260  # pixels


def page(report: dict[str, Any], title: str = "Datasets") -> str:
    """The report of `glm.data.prepare.prepare` as HTML."""
    return document(title, sections(report))


def sections(report: dict[str, Any]) -> list[str]:
    """The parts of the page: all datasets side by side, then each."""
    each = [_section(use, name, counts) for use, datasets in report.items() for name, counts in datasets.items()]
    return [_overview(report), *each]


def _overview(report: dict[str, Any]) -> str:
    columns = ("read", "kept", "train", "dev", "test", "repeated", "duplicates", "truncated")
    rows = [
        [use, name, *(counts[column] for column in columns), counts["tokens"]["total"]]
        for use, datasets in report.items()
        for name, counts in datasets.items()
    ]
    return table(["use", "dataset", *columns, "tokens"], rows)


def _section(use: str, name: str, counts: dict[str, Any]) -> str:
    tokens = counts["tokens"]
    starts = tokens["histogram"]["from"]
    ends = [f"–{end - 1}" for end in starts[1:]] + ["+"]
    lengths = [
        (f"{start}{end}", rows) for start, end, rows in zip(starts, ends, tokens["histogram"]["rows"], strict=True)
    ]
    languages = [(language, share) for language, share in counts["languages"].items()]
    what = "an estimate" if tokens["counted_by"] == "estimate" else f"counted by {tokens['counted_by']}"
    numbers = ", ".join(f"{key} {tokens[key]:,}" for key in ("mean", "p50", "p90", "p99", "max"))
    return "\n".join(
        [
            f"<h2>{escape(use)}: {escape(name)}</h2>",
            f"<p>{counts['read']:,} rows read, {counts['kept']:,} kept, {counts['truncated']:,} of them longer than "
            f"the limits. Tokens a row ({escape(what)}): {numbers}.</p>",
            "<div class='figures'>",
            _bars("Rows by tokens", lengths, "{:,}"),
            _bars("Language", languages, "{:.1%}"),
            _bars("Dropped", list(counts["dropped"].items()), "{:,}") if counts["dropped"] else "",
            "</div>",
            "<h3>Longest rows</h3>"
            + table(["row", "tokens"], [[row["id"], row["tokens"]] for row in counts["longest"]]),
            _dropped(counts["dropped_rows"]),
        ]
    )


def _dropped(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    return "<h3>Some dropped rows</h3>" + table(
        ["row", "line", "reason"], [[row["id"], row.get("line", ""), row["reason"]] for row in rows]
    )


def _bars(title: str, values: list[tuple[str, float]], form: str) -> str:
    """Horizontal bars, one a value, in their order; leading and trailing zeros are left out."""
    while values and not values[-1][1]:
        values = values[:-1]
    while values and not values[0][1]:
        values = values[1:]
    highest = max((value for _, value in values), default=1)
    height = len(values) * (BAR + GAP)
    lines = [
        f"<figure><figcaption>{escape(title)}</figcaption>",
        f"<svg width='{LABELS + WIDTH + 70}' height='{height}' font-size='12' fill='#222' role='img'>",
    ]
    for at, (label, value) in enumerate(values):
        top, length = at * (BAR + GAP), round(WIDTH * value / highest, 1)
        middle = top + BAR - 4
        lines.append(
            f"<text x='{LABELS - 6}' y='{middle}' text-anchor='end'>{escape(label[:18])}</text>"
            f"<rect x='{LABELS}' y='{top}' width='{length}' height='{BAR}' fill='#4c78a8'>"
            f"<title>{escape(label)}: {form.format(value)}</title></rect>"
            f"<text x='{LABELS + length + 5}' y='{middle}'>{form.format(value)}</text>"
        )
    return "\n".join([*lines, "</svg></figure>"])
