"""A lineage as a tree for the terminal, and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from rich.markup import escape
from rich.tree import Tree

from flows.lineage import Lineage, Node

SHOWN_METRICS = 6
COLOURS = {"data": "#9ecae1", "rows": "#a1d99b", "tokens": "#c7e9c0", "model": "#fdae6b", "report": "#d9d9d9"}


def tree(lineage: Lineage) -> Tree:
    """The run's facts, then each node below what was asked about, with what it was made from and by."""
    facts = lineage.facts
    root = Tree(f"[bold]{escape(facts.get('version', lineage.of))}[/bold]  run {facts['run']} ({lineage.run_id})")
    dirty = f"[red]with uncommitted changes in {escape(', '.join(facts['uncommitted']))}[/red]"
    root.add(f"commit {facts['commit'][:12]} {dirty if facts['uncommitted'] else '(nothing uncommitted)'}")
    root.add(f"requirements.lock {facts['requirements_lock_md5'] or 'not recorded'}")
    for fault in facts["faults"]:
        root.add(f"[red]does not fit together: {escape(fault)}[/red]")
    if "promoted.reason" in facts:
        root.add(
            escape(f"promoted {facts['promoted.at']} by {facts.get('promoted.by', '?')}: {facts['promoted.reason']}")
        )
    for node in lineage.nodes:
        branch = root.add(f"[bold]{escape(node.name)}[/bold]  {node.hash[:16]}")
        for line in lines_of(node):
            branch.add(escape(line))
    return root


def lines_of(node: Node) -> list[str]:
    """What is worth a line of a node."""
    facts = node.facts
    lines = [f"from {', '.join(node.made_from)}"] if node.made_from else []
    for name, digest in facts.get("files", {}).items():
        lines.append(f"{name} sha256 {digest[:16]}")
    rows = facts.get("rows")
    if isinstance(rows, dict):
        for use, counts in rows.items():
            lines.append(f"{use}: {counts['read']} rows read, {counts['kept']} kept, {counts['train']} to train on")
    elif rows is not None:
        lines.append(f"{rows} rows")
    if "model" in facts:
        lines.append(f"model {facts['model']['path']} revision {facts['model']['revision'] or 'none'}")
    if facts.get("run"):
        lines.append(f"run {facts['run']}")
    if facts.get("machine"):
        words = (f"{key.removeprefix('machine.')} {value}" for key, value in facts["machine"].items())
        lines.append("on " + ", ".join(words))
    if facts.get("metrics"):
        best = list(facts["metrics"].items())[:SHOWN_METRICS]
        lines.append(", ".join(f"{name} {value:.4g}" for name, value in best))
    return lines


def draw(lineage: Lineage, path: Path) -> None:
    """Draw the chain from left to right into a .png, .svg or .pdf file."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    columns = columns_of(lineage.nodes)
    height = max(len(column) for column in columns)
    figure = Figure(figsize=(3.2 * len(columns), max(3.0, 1.1 * height)), dpi=100, layout="constrained")
    panel = figure.add_subplot()
    panel.set(
        xlim=(-0.6, len(columns) - 0.4), ylim=(-0.9, height - 0.1), title=lineage.facts.get("version", lineage.of)
    )
    panel.axis("off")
    boxes = {}
    for node, (x, y) in places(columns, height):
        text = panel.text(
            x, y, f"{node.name}\n{node.hash[:12]}", ha="center", va="center", fontsize=8, parse_math=False, zorder=2,
            bbox={"boxstyle": "round", "facecolor": COLOURS[node.kind], "edgecolor": "grey"},
        )  # fmt: skip
        boxes[node.name] = text
        for source in filter(boxes.__contains__, node.made_from):
            beside = boxes[source]
            look = {"arrowstyle": "->", "color": "grey", "connectionstyle": "arc3,rad=0.06"}
            ends = {"patchA": beside.get_bbox_patch(), "patchB": text.get_bbox_patch()}
            panel.annotate("", (x, y), beside.get_position(), zorder=1, arrowprops=look | ends)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def places(columns: list[list[Node]], height: int) -> Iterator[tuple[Node, tuple[float, float]]]:
    """Each node with its place: beside what it was made from, and no two columns level, so that no line hides one."""
    ys: dict[str, float] = {}
    for x, column in enumerate(columns):
        sources = {node.name: [ys[name] for name in node.made_from if name in ys] for node in column}
        column = sorted(column, key=lambda node: fmean(sources[node.name] or [0.0]))
        for number, node in enumerate(column):
            ys[node.name] = (number + 0.5) * height / len(column) - 0.5 + (0.2, -0.2, 0.0)[x % 3]
            yield node, (x, ys[node.name])


def columns_of(nodes: list[Node]) -> list[list[Node]]:
    """The nodes by how many steps they are from the data."""
    depth: dict[str, int] = {}
    columns: list[list[Node]] = []
    for node in nodes:
        depth[node.name] = max((depth[source] + 1 for source in node.made_from if source in depth), default=0)
        while len(columns) <= depth[node.name]:
            columns.append([])
        columns[depth[node.name]].append(node)
    return columns
