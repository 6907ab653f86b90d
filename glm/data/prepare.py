"""Fetched files → checked, de-duplicated rows, split into train, dev and test.

A row's split depends on the hash of its group, or else of its first question (the normalised text), alone. So it never
changes when another dataset is added, and no question is trained on in one stage and tested in another.

Rows stream from file to file. What stays in memory is about 150 bytes a row: hashes for de-duplication and choice.
"""

import hashlib
import json
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from glm.config import Data
from glm.data.mixing import EVERY, Share, shares, smallest
from glm.data.raw_rows import read_rows
from glm.data.registry import Entry
from glm.data.report import DatasetReport
from glm.data.rows import SPLITS, USES, Row, Use, question_of, texts_of
from glm.data.text import LANGUAGES, language, normalise
from glm.data.token_counter import TokenEstimate
from glm.errors import InputError
from glm.files import replace_folder

Progress = Callable[[int, int, str], None]
LANGUAGE_CHARACTERS = 2000  # enough of a row to tell its language


class _Spool:
    """The usable rows of one dataset and split: their lines on disk, what choosing needs of each in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = array("Q")
        self.tokens = array("I")
        self.truncated = array("B")
        self.languages = array("B")

    def add(self, key: int, tokens: int, truncated: bool, language: int) -> None:
        """Note one row, in the order of its line."""
        self.keys.append(key)
        self.tokens.append(min(tokens, 2**32 - 1))
        self.truncated.append(truncated)
        self.languages.append(language)


@dataclass
class _Reading:
    """How the datasets of one use are read, and what they said so far."""

    use: Use
    params: Data
    counter: TokenEstimate
    stop_at_broken: bool
    seen: dict[int, int] = field(default_factory=dict)
    """Hash of a row as far as it counts for de-duplication → hash of its exact content."""


def split_of(question: str, dev_ratio: float, test_ratio: float) -> str:
    """train, dev or test by the question's hash: the same on every machine, for every mix of datasets."""
    position = _hash(normalise(question)) / 2**64
    return "test" if position < test_ratio else "dev" if position < test_ratio + dev_ratio else "train"


def prepare(
    params: Data,
    raw: str | Path,
    out: str | Path,
    *,
    counter: TokenEstimate | None = None,
    broken: Literal["stop", "count"] = "stop",
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Write `out`/<use>/<split>.jsonl from the files that `glm.data.sources.fetch` brought to `raw`; return the report.

    The report has an entry per use and dataset (glm.data.report): read = kept + the sum of dropped.

    Args:
        counter: how tokens are counted; an estimate without it.
        broken: what to do with a row that does not parse: stop the run, or count it and go on.
        progress: told how many datasets are done.

    Raises:
        InputError: a file cannot be parsed (names file and line), or a split that a stage needs would be empty.
    """
    raw = Path(raw)
    counter = counter or TokenEstimate(params)
    sources = json.loads((raw / "sources.json").read_text(encoding="utf-8"))
    total, done = sum(len(getattr(params, use)) for use in USES), 0
    with replace_folder(out) as folder:
        report: dict[str, Any] = {}
        for use in USES:
            mixture: list[str] | dict[str, float] = getattr(params, use)
            if not mixture:
                continue
            (folder / use).mkdir()
            reading = _Reading(use, params, counter, stop_at_broken=broken == "stop")
            reports, spools = {}, {}
            for name in mixture:
                progress(done, total, f"{use}: {name}")
                entry = Entry.model_validate(sources[name]["entry"])
                reports[name] = DatasetReport(counter.name)
                spools[name] = {split: _Spool(folder / use / f".{name}.{split}") for split in SPLITS}
                _read_dataset(name, entry, raw / name, reading, reports[name], spools[name])
                done += 1
            _write_splits(folder / use, mixture, params, reports, spools)
            report[use] = {name: reports[name].as_dict() for name in mixture}
            if broken == "stop":
                _require_rows(use, report[use], params)
        progress(done, total, "")
    return report


def _require_rows(use: Use, reports: dict[str, dict[str, Any]], params: Data) -> None:
    """Raise an InputError if a split of a use would be empty (dev may, where it was not asked for)."""
    kept = sum(counts["kept"] for counts in reports.values())
    for split in SPLITS:
        if any(counts[split] for counts in reports.values()) or (split == "dev" and not params.dev_ratio):
            continue
        hint = f"; {kept} rows are few for their hashes to choose from: raise data.{split}_ratio"
        counts = {name: {key: counts[key] for key in ("read", "dropped")} for name, counts in reports.items()}
        raise InputError(
            f"data.{use} ({', '.join(reports)}): no rows are left for {split}; read and dropped: "
            f"{json.dumps(counts, ensure_ascii=False)}{hint if kept and split != 'train' else ''}"
        )


def _read_dataset(
    name: str,
    entry: Entry,
    folder: Path,
    reading: _Reading,
    report: DatasetReport,
    spools: dict[str, _Spool],
) -> None:
    """Stream one dataset into its spools, and count what was dropped."""
    params = reading.params
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(open(spool.path, "w", encoding="utf-8", newline="\n"))
            for split, spool in spools.items()
        }
        for identity, line, row, reason, is_broken in read_rows(name, entry, folder, reading.use, params.placeholders):
            report.read += 1
            report.broken += is_broken
            if is_broken and reading.stop_at_broken:
                file_name = identity.removeprefix(f"{name}:").rpartition(":")[0]
                raise InputError(
                    f"dataset {name!r}: {file_name}{f', line {line}' if line else ''}: {reason} "
                    f"(`glmflow data check {name} --use {reading.use}` shows all that is wrong)"
                )
            if row is None:
                report.drop(identity, line, reason)
                continue
            texts = texts_of(row)
            content = json.dumps([row[key] for key in sorted(row) if key not in ("id", "group")], ensure_ascii=False)
            if why := _duplicate(content, texts, row, params.deduplicate, reading.seen):
                report.drop(identity, line, why)
                continue
            split = split_of(row.get("group") or question_of(row), params.dev_ratio, params.test_ratio)
            lengths = [reading.counter.count(text) for text in texts]
            files[split].write(json.dumps(row, ensure_ascii=False) + "\n")
            spools[split].add(
                key=_hash(f"{params.seed}:{content}"),
                tokens=sum(lengths),
                truncated=reading.counter.truncated(row, lengths),
                language=LANGUAGES.index(language("\n".join(texts)[:LANGUAGE_CHARACTERS])),
            )


def _duplicate(content: str, texts: list[str], row: Row, deduplicate: str, seen: dict[int, int]) -> str:
    """Why the row is not new ("" if it is), by what an earlier row of the same use said."""
    if deduplicate == "none":
        return ""
    exact = _hash(content)
    same = exact
    if deduplicate == "near":
        same = _hash("\x1f".join([*map(normalise, texts), str(row.get("label", ""))]))
    if same in seen:
        return "duplicate" if seen[same] == exact else "near duplicate"
    seen[same] = exact
    return ""


def _write_splits(
    folder: Path,
    mixture: list[str] | dict[str, float],
    params: Data,
    reports: dict[str, DatasetReport],
    spools: dict[str, dict[str, _Spool]],
) -> None:
    """Choose rows, write `folder`/<split>.jsonl in the order of the mixture, and remove the spools."""
    for split in SPLITS:
        mine = {name: spools[name][split] for name in mixture}
        bounds = {
            name: EVERY if params.max_samples is None else smallest(spool.keys, params.max_samples)
            for name, spool in mine.items()
        }
        given = {name: Share(1, 0) for name in mixture}
        if isinstance(mixture, dict) and split == "train":
            keys, tokens = {}, {}
            for name, spool in mine.items():
                chosen = [at for at, key in enumerate(spool.keys) if key < bounds[name]]
                keys[name] = array("Q", (spool.keys[at] for at in chosen))
                tokens[name] = array("I", (spool.tokens[at] for at in chosen))
            given = shares(mixture, keys, tokens, params.mix_by, params.mix_strategy)
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as out:
            for name, spool in mine.items():
                _write_rows(out, split, spool, bounds[name], given[name], reports[name])
                spool.path.unlink()


def _write_rows(out: IO[str], split: str, spool: _Spool, bound: int, share: Share, report: DatasetReport) -> None:
    for turn in range(share.passes + 1):
        below = bound if turn < share.passes else min(bound, share.below)
        with open(spool.path, encoding="utf-8", newline="\n") as file:
            for at, line in enumerate(file):
                key = spool.keys[at]
                taken = key < below
                if taken:
                    out.write(line)
                if turn > 0:
                    report.repeated += taken
                elif taken:
                    report.keep(split, line, spool.tokens[at], spool.truncated[at], spool.languages[at])
                else:
                    report.dropped["max_samples" if key >= bound else "weight"] += 1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
