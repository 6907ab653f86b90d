"""Tokenised rows on disk, found by content: the same rows, tokenizer, template, limits and code are encoded once.

A set is an Arrow dataset in a folder named by the hash of all that its token ids depend on, and of nothing else (a
path, a time): a fresh clone finds it and an edited row does not. It is written beside its place and renamed, and a
kernel lock makes two runs that want the same set do the work once.

Left out: clearing old sets. Removing the folder, or any set in it, is always safe.
"""

import ctypes
import fcntl
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from glm.config import Data
from glm.files import file_hash, replace_folder, write_json

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int, str], None]
Example = dict[str, Any]

ENCODED_BY = (  # their source is part of the key
    "glm.data.batch_encode",
    "glm.data.cache",
    "glm.data.encode",
    "glm.data.rows",
    "glm.models.chat_encoding",
)
LIBRARIES = ("sentencepiece", "tokenizers", "transformers")
LIMITS = ("max_source_length", "max_target_length", "source_prefix")
PR_SET_PDEATHSIG = 1  # of Linux' prctl: a worker does not outlive a parent that is killed
CHUNK = 1000  # rows that a process takes at a time
ROWS_PER_PROCESS = 5000  # fewer rows are not worth a process


class TokenizedRows(Sequence[Example]):
    """Encoded rows in the order of their file, read from disk as they are asked for.

    To a trainer it is a list of dicts; a column of token ids is a list of ints. See `glm.data.encode.encode_row`.
    """

    def __init__(self, dataset: "Dataset", summary: dict[str, int]) -> None:
        self.dataset = dataset
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
        if not target.exists():
            for left in target.parent.glob(f".{key}.*"):  # by a run that was killed
                shutil.rmtree(left)
            with replace_folder(target) as written:
                rows = _encode_file(Path(path), written / "data.arrow", tokenizer, params, processes, progress)
                write_json(written / "meta.json", {"key": parts, **rows})
    return read(target)


def read(folder: Path) -> TokenizedRows:
    """A set of the cache."""
    from datasets import Dataset

    summary = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return TokenizedRows(Dataset.from_file(str(folder / "data.arrow")), summary)


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


def _encode_file(
    source: Path,
    target: Path,
    tokenizer: "PreTrainedTokenizerBase",
    params: Data,
    processes: int | None,
    progress: Progress,
) -> dict[str, int]:
    """Encode a file of rows to an Arrow file; return how many rows, tokens and cut rows."""
    import pyarrow

    total = _count_lines(source)
    if processes is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = max(1, min(cpus, total // ROWS_PER_PROCESS))
    summary = {"rows": 0, "tokens": 0, "truncated": 0}
    writer = None
    text = f"tokenizing {source.parent.name}/{source.name}"
    progress(0, total, text)
    for batch in _encoded(source, tokenizer, params, processes):
        writer = writer or pyarrow.ipc.new_stream(str(target), batch.schema)
        writer.write_batch(batch)
        summary["rows"] += batch.num_rows
        summary["tokens"] += _token_count(batch)
        summary["truncated"] += batch.column("truncated").true_count
        progress(summary["rows"], total, text)
    if writer is None:
        writer = pyarrow.ipc.new_stream(str(target), pyarrow.schema([("truncated", pyarrow.bool_())]))
    writer.close()
    return summary


def _encoded(
    source: Path, tokenizer: "PreTrainedTokenizerBase", params: Data, processes: int
) -> Iterator["pyarrow.RecordBatch"]:
    """Batches of the file in order; at most two chunks a process are under way, so that memory stays bounded."""
    if processes == 1:
        from glm.data.batch_encode import RowEncoder

        encoder = RowEncoder(tokenizer, params)
        for lines in _chunks(source):
            yield to_batch(encoder([json.loads(line) for line in lines]))
        return
    # Forked as a DataLoader's workers are: a fresh interpreter would import transformers again, for longer than a
    # hundred thousand rows take. The children never touch the GPU that the parent may hold.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _start_worker, (tokenizer, params, os.getpid())) as pool:
        waiting: deque[Future[pyarrow.RecordBatch]] = deque()
        try:
            for lines in _chunks(source):
                waiting.append(pool.submit(_work, lines))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def to_batch(examples: list[Example]) -> "pyarrow.RecordBatch":
    """Encoded rows as Arrow columns: lists of int32, and booleans."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    types = {"input_ids": ids, "labels": ids, "starts": ids, "sequences": pyarrow.list_(ids)}
    return pyarrow.RecordBatch.from_pydict(
        {
            name: pyarrow.array([example[name] for example in examples], types.get(name, pyarrow.bool_()))
            for name in examples[0]
        }
    )


_encoder: Any = None  # of a worker process


def _start_worker(tokenizer: "PreTrainedTokenizerBase", params: Data, parent: int) -> None:
    from glm.data.batch_encode import RowEncoder

    global _encoder
    _encoder = RowEncoder(tokenizer, params)
    gc.freeze()  # encoding makes many lists and no cycles: looking for them takes a third of the time
    gc.disable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handlers are not for the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _work(lines: list[str]) -> "pyarrow.RecordBatch":
    return to_batch(_encoder([json.loads(line) for line in lines]))


def _chunks(source: Path) -> Iterator[list[str]]:
    with open(source, encoding="utf-8", newline="\n") as file:
        while lines := list(islice(file, CHUNK)):
            yield lines


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _token_count(batch: "pyarrow.RecordBatch") -> int:
    if "sequences" in batch.schema.names:
        return len(batch.column("sequences").flatten().flatten())
    return len(batch.column("input_ids").flatten())


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
