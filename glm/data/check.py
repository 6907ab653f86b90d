"""Check datasets without training on them: `python -m glm.data.check [NAME …]`.

Reads what data/dataset_info.json names exactly as the pipeline does, in one streaming pass, and reports what would be
kept, dropped and cut, with every fault counted where the pipeline would stop at the first. Without names it checks the
datasets of params.yaml. Exit status: 0 fine, 1 rows that do not parse or a dataset without usable rows, 2 wrong input.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from glm.config import Data, load_params
from glm.data.prepare import Progress, prepare
from glm.data.report_page import page
from glm.data.rows import USES
from glm.data.sources import fetch
from glm.data.token_counter import TokenEstimate, TokenizerCounter
from glm.errors import InputError
from glm.files import write_json, write_text


def check(
    params: Data,
    out: str | Path | None = None,
    *,
    counter: TokenEstimate | None = None,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Report on the datasets of `params` (see glm.data.prepare); write report.json and report.html to `out` if given.

    Local files are read where they are; only hub and URL sources are brought to a temporary folder.

    Raises:
        InputError: unknown dataset, missing file, failed download, or a hash that differs from the registry's.
    """
    names = [name for use in USES for name in getattr(params, use)]
    with tempfile.TemporaryDirectory() as scratch:
        fetch(names, params.dataset_dir, Path(scratch, "raw"), link=True)
        report = prepare(
            params, Path(scratch, "raw"), Path(scratch, "rows"),
            counter=counter, broken="count", progress=progress,
        )  # fmt: skip
    if out is not None:
        write_json(Path(out, "report.json"), report)
        write_text(Path(out, "report.html"), page(report))
    return report


def broken_rows(report: dict[str, Any]) -> int:
    """How many rows did not parse."""
    return sum(counts["broken"] for datasets in report.values() for counts in datasets.values())


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines of text: one a dataset, and one a reason for which rows were dropped."""
    lines = []
    for use, datasets in report.items():
        for name, counts in datasets.items():
            tokens = counts["tokens"]
            lines.append(
                f"{use} {name}: read {counts['read']}, kept {counts['kept']} (train {counts['train']}, dev "
                f"{counts['dev']}, test {counts['test']}), cut {counts['truncated']}; tokens a row: median "
                f"{tokens['p50']}, 99 % {tokens['p99']}, max {tokens['max']} ({tokens['counted_by']})"
            )
            lines += [f"    dropped {count}: {reason}" for reason, count in counts["dropped"].items()]
            lines += [
                f"    {row['id']}" + (f", line {row['line']}" if "line" in row else "") + f": {row['reason']}"
                for row in counts["dropped_rows"]
            ]
    return "\n".join(lines)


def check_parser() -> argparse.ArgumentParser:
    """The options of `glmflow data check` and `python -m glm.data.check`."""
    options = argparse.ArgumentParser(prog="glmflow data check", description="Check datasets without training on them.")
    options.add_argument("names", nargs="*", help="datasets; without any, those of params.yaml")
    options.add_argument(
        "--use", choices=USES, default="sft", help="what the named datasets are to serve (default sft)"
    )
    options.add_argument("--params", default="params.yaml", help="where limits and ratios are read from")
    options.add_argument("--tokenizer", help="folder or hub id to count tokens with; without one they are estimated")
    options.add_argument("--out", help="folder for report.json and report.html")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = check_parser().parse_args(arguments)
    try:
        data = load_params(given.params).data
        if given.names:
            data = data.model_copy(update={use: [] for use in USES} | {given.use: given.names})
        counter = None
        if given.tokenizer:
            from glm.models import load_tokenizer

            counter = TokenizerCounter(data, load_tokenizer(given.tokenizer), given.tokenizer)
        report = check(data, given.out, counter=counter)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(report))
    is_empty = any(not counts["kept"] for datasets in report.values() for counts in datasets.values())
    return 1 if is_empty or broken_rows(report) else 0


if __name__ == "__main__":
    sys.exit(main())
