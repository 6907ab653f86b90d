"""The table of a comparison: one row a variant, with mean and spread over its seeds; as text, as CSV, as a picture."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 4  # side by side in the picture


@dataclass(frozen=True)
class Column:
    """A metric of the table: its name among the values, its title, and how many digits are shown."""

    name: str
    title: str
    digits: int


@dataclass(frozen=True)
class Result:
    """What one variant came to with one seed: its metrics, or why there are none."""

    variant: str
    seed: int | None
    values: Mapping[str, float]
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A variant over its seeds.

    `spread` is the standard deviation of the sample (n - 1 below the line); it is empty for a single seed.
    """

    variant: str
    seeds: int
    failed: int
    mean: dict[str, float]
    spread: dict[str, float]


def rows(results: Sequence[Result]) -> list[Row]:
    """Gather results by variant, in the order in which the variants appear. Failed ones are counted and left out."""
    variants: dict[str, list[Result]] = {}
    for result in results:
        variants.setdefault(result.variant, []).append(result)
    found = []
    for variant, of_it in variants.items():
        good = [result.values for result in of_it if not result.error]
        names = [name for name in dict.fromkeys(name for values in good for name in values)]
        by_name = {name: [values[name] for values in good if name in values] for name in names}
        found.append(
            Row(
                variant,
                seeds=len(good),
                failed=len(of_it) - len(good),
                mean={name: statistics.fmean(values) for name, values in by_name.items()},
                spread={name: statistics.stdev(values) for name, values in by_name.items() if len(values) > 1},
            )
        )
    return found


def shown(columns: Sequence[Column], found: Sequence[Row]) -> list[Column]:
    """The columns that hold something."""
    return [column for column in columns if any(column.name in row.mean for row in found)]


def text(row: Row, column: Column) -> str:
    """One cell: `17.01 ± 0.12`, `17.01` for a single seed, nothing where nothing was measured.

    A spread that rounds to nothing is left out, as for numbers that are equal by nature. Where an interval was measured
    (`<name>_low`, `<name>_high`), the mean of it over the seeds follows: `0.62 [0.55, 0.69]`.
    """
    if column.name not in row.mean:
        return ""
    mean = f"{row.mean[column.name]:,.{column.digits}f}"
    spread = f"{row.spread.get(column.name, 0.0):,.{column.digits}f}"
    shown = f"{mean} ± {spread}" if float(spread.replace(",", "")) else mean
    if f"{column.name}_low" in row.mean:
        low, high = (row.mean[f"{column.name}_{end}"] for end in ("low", "high"))
        shown += f" [{low:,.{column.digits}f}, {high:,.{column.digits}f}]"
    return shown


def table_csv(found: Sequence[Row], columns: Sequence[Column]) -> str:
    """The rows with every digit: variant, seeds, failed, then each metric and its spread (`<name>_std`)."""
    out = io.StringIO()
    names = [column.name for column in columns]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "seeds", "failed", *(part for name in names for part in (name, f"{name}_std"))])
    for row in found:
        values = (values.get(name, "") for name in names for values in (row.mean, row.spread))
        writer.writerow([row.variant, row.seeds, row.failed, *values])
    return out.getvalue()


def draw(found: Sequence[Row], columns: Sequence[Column], title: str) -> "Figure":
    """One panel a metric, one bar a variant; whiskers are one standard deviation over the seeds each way."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    lines = math.ceil(len(columns) / PANELS)
    width = min(PANELS, len(columns))
    figure = Figure(figsize=(max(3.2, 0.5 * len(found) + 1) * width, 2.8 * lines), dpi=100, layout="constrained")
    figure.suptitle(title)
    for position, column in enumerate(columns, start=1):
        panel = figure.add_subplot(lines, width, position, title=column.title)
        for place, row in enumerate(found):
            if column.name in row.mean:
                spread = row.spread.get(column.name)
                panel.bar(place, row.mean[column.name], yerr=spread, capsize=4, color=f"C{place % 10}")
        panel.set_xticks(range(len(found)), [row.variant for row in found], rotation=30, ha="right", fontsize=8)
        low, high = _limits([row for row in found if column.name in row.mean], column.name)
        panel.set_ylim(low, high)
    return figure


def _limits(found: Sequence[Row], name: str) -> tuple[float, float]:
    """From zero, unless all bars are long and nearly equal: then their difference would not be seen."""
    ends = [row.mean[name] + sign * row.spread.get(name, 0.0) for row in found for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    room = 0.08 * ((high - low) or abs(high) or 1.0)
    if low > 0 and low > 0.6 * high:
        return low - 3 * room, high + room
    return min(0.0, low - room), max(0.0, high + room)
