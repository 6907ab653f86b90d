"""Tokenised rows on disk, found by content: the same rows, tokenizer, template, limits and code are encoded once.

A set is an Arrow dataset in a folder named by the hash of all that its token ids depend on, and of nothing else (a
path, a time): a fresh clone finds it and an edited row does not. It is written beside its place and renamed, and a
kernel lock makes two runs that want the same set do the work once.

A new set clears away those that were not used for KEEP_DAYS; `glmflow data clean` does it at once. Removing the folder,
or any set in it, is always safe.
"""

import fcntl
import hashlib
import importlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from glm.config import Data
from glm.data import packing
from glm.data.encode_file import Example, Progress, encode_file
from glm.data.packing import PackedRows
from glm.files import file_hash, replace_folder, write_json, write_text

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ENCODED_BY = (  # their source is part of the key
    "glm.data.batch_encode",
    "glm.data.cache",
    "glm.data.encode",
    "glm.data.encode_file",
    "glm.data.rows",
    "glm.models.chat_encoding",
)
LIBRARIES = ("sentencepiece", "tokenizers", "transformers")
LIMITS = ("max_source_length", "max_target_length", "source_prefix")
KEEP_DAYS = 30  # since its last use

logger = logging.getLogger(__name__)


class TokenizedRows(Sequence[Example]):
    """Encoded rows in the order of their file, read from disk as they are asked for.

    To a trainer it is a list of dicts; a column of token ids is a list of ints. See `glm.data.encode.encode_row`.
    """

    def __init__(self, dataset: "Dataset", summary: dict[str, int], folder: Path) -> None:
        self.dataset = dataset
        self.folder = folder
        self.key = folder.name
        """The set's name in the cache: a hash of all that it depends on."""
        self.truncated = summary["truncated"]
        """Rows that were cut."""
        self.tokens = summary["tokens"]
        """Token ids in all rows."""

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return self.__getitems__(list(range(*index.indices(len(self)))))
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Example]:
        """Several rows at once, as a DataLoader asks for them."""
        return self.dataset.__getitems__(indices) if indices else []

    def lengths(self) -> list[list[int]]:
        """Token ids of every sequence of every row (one, or all of a ranking), without reading the ids."""
        table = self.dataset.data
        found: list[list[int]] = []
        for chunk in table.column("sequences").chunks if "sequences" in table.column_names else ():
            flat = iter(_lengths(chunk.flatten()))
            found += [list(islice(flat, count)) for count in _lengths(chunk)]
        for chunk in table.column("input_ids").chunks if "input_ids" in table.column_names else ():
            found += [[length] for length in _lengths(chunk)]
        return found

    def rankings(self) -> "Iterator[list[np.ndarray]]":
        """The token ids of every ranking's sequences, without making lists of them."""
        for chunk in self.dataset.data.column("sequences").chunks:
            sequences = chunk.flatten()
            ids, ends = sequences.flatten().to_numpy(), accumulate(_lengths(sequences), initial=0)
            spans = (ids[start:end] for start, end in pairwise(ends))
            yield from (list(islice(spans, count)) for count in _lengths(chunk))

    def packed(self, capacity: int, seed: int, sizes: list[int] | None = None) -> PackedRows:
        """All rows side by side in rows of `capacity` tokens (glm.data.packing), worked out once for each set.

        `sizes`: what each row counts; None: all of its token ids.
        """
        sizes = sizes or [sum(each) for each in self.lengths()]
        asked = {"capacity": capacity, "seed": seed, "sizes": _digest(json.dumps(sizes))}
        asked["code"] = file_hash(Path(packing.__file__), "sha256")
        path = self.folder / f"packed-{_digest(json.dumps(asked, sort_keys=True))}.json"
        if not path.exists():
            rows = packing.pack(sizes, capacity, seed)
            write_text(path, json.dumps({**asked, "rows": rows}))
        return PackedRows(self, json.loads(path.read_text(encoding="utf-8"))["rows"])


def tokenize(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    params: Data,
    folder: str | Path = ".cache/tokenized",
    *,
    processes: int | None = None,
    progress: Progress = lambda done, total, text: None,
) -> TokenizedRows:
    """The rows of a prepared file (`prepared/rows/<use>/<split>.jsonl`) as token ids, from the cache where it has them.

    Args:
        folder: where the cache is.
        processes: how many encode; None: as many as there are CPUs, and one for few rows.
        progress: told how many rows are encoded.

    Raises:
        InputError: a row cannot be encoded (a template that refuses it, or limits below the template's own length).
    """
    key, parts = cache_key(path, tokenizer, params)
    target = Path(folder) / key
    with _lock(Path(folder) / f"{key}.lock", progress):
        is_new = not (target / "meta.json").exists()
        if is_new:
            for left in target.parent.glob(f".{key}.*"):  # by a run that was killed
                shutil.rmtree(left)
            with replace_folder(target) as written:
                rows = encode_file(Path(path), written / "data.arrow", tokenizer, params, processes, progress)
                write_json(written / "meta.json", {"key": parts, **rows})
        os.utime(target)  # says when it was last used
        found = read(target)
    if is_new and (removed := clean(folder)):
        logger.info("removed %d tokenised sets that were not used for %d days", len(removed), KEEP_DAYS)
    return found


def clean(folder: str | Path = ".cache/tokenized", days: float = KEEP_DAYS) -> dict[str, int]:
    """Remove the sets that were not used for so many days, and what killed runs left; return their bytes by name.

    A set that a run is writing or opening is left alone. One that is open stays readable for the run that has it.
    """
    removed = {}
    for path in sorted(entry for entry in Path(folder).glob("*") if entry.is_dir()):
        key = path.name.split(".")[1] if path.name.startswith(".") else path.name
        with open(Path(folder) / f"{key}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if path.is_dir() and (path.name != key or path.stat().st_mtime <= time.time() - days * 86400):
                removed[path.name] = sum(part.stat().st_size for part in path.iterdir())
                shutil.rmtree(path)
    return removed


def read(folder: Path) -> TokenizedRows:
    """A set of the cache."""
    from datasets import Dataset

    summary = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return TokenizedRows(Dataset.from_file(str(folder / "data.arrow")), summary, folder)


def cache_key(path: str | Path, tokenizer: "PreTrainedTokenizerBase", params: Data) -> tuple[str, dict[str, Any]]:
    """The name of a set, and what it is made from."""
    parts = {
        "rows": file_hash(Path(path), "sha256"),
        "tokenizer": _tokenizer_hash(tokenizer),
        "limits": {name: getattr(params, name) for name in LIMITS},
        "code": _code_hash(tokenizer),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return _digest(json.dumps(parts, sort_keys=True)), parts


def _tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of vocabulary, special tokens and chat template, wherever the tokenizer was loaded from."""
    from transformers import TokenizersBackend

    vocabulary = (
        tokenizer.backend_tokenizer.to_str().encode()
        if isinstance(tokenizer, TokenizersBackend)
        else tokenizer.sp_model.serialized_model_proto()
    )
    added = {str(at): repr(token) for at, token in sorted(tokenizer.added_tokens_decoder.items())}
    rest = [type(tokenizer).__name__, tokenizer.chat_template, added, tokenizer.special_tokens_map]
    return hashlib.sha256(vocabulary + json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()


def _code_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    names = {*ENCODED_BY, *(base.__module__ for base in type(tokenizer).__mro__ if base.__module__.startswith("glm."))}
    files = [Path(str(importlib.import_module(name).__file__)) for name in sorted(names)]
    return _digest("".join(file_hash(file, "sha256") for file in files))


def _lengths(lists: Any) -> list[int]:
    """Of an Arrow array of lists."""
    return lists.value_lengths().to_pylist()


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold a kernel lock; it is gone with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0, 0, "waiting for a run that encodes the same rows")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
