"""A file of prepared rows → an Arrow file of token ids, by as many processes as there are CPUs, in bounded memory."""

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import Data

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int, str], None]
Example = dict[str, Any]

PR_SET_PDEATHSIG = 1  # of Linux' prctl: a worker does not outlive a parent that is killed
CHUNK = 1000  # rows that a process takes at a time
ROWS_PER_PROCESS = 5000  # fewer rows are not worth a process


def encode_file(
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
