"""Rows that are full, fair samples, and worked out once for each set of tokenised rows."""

import json
import random
from pathlib import Path

import pytest

from glm.config import Data
from glm.data import packing
from glm.data.cache import TokenizedRows, tokenize
from glm.data.packing import PackedRows, best_fit, pack
from glm.files import write_jsonl
from glm.models import load_tokenizer

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer-chatglm2-tiny"


def alpaca_lengths(count: int) -> list[int]:
    rng = random.Random(0)
    return [int(min(1024, max(24, rng.lognormvariate(5.07, 0.7)))) for _ in range(count)]


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_rows_are_full(capacity: int) -> None:
    lengths = alpaca_lengths(2000)
    rows = pack(lengths, capacity, seed=0)
    assert sorted(index for row in rows for index in row) == list(range(2000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= capacity
    fill = sum(lengths) / (len(rows) * capacity)
    assert fill >= 0.97 and fill > sum(lengths) / (len(best_fit(sorted(lengths)[::-1], capacity)) * capacity) - 0.01
    assert max(map(len, rows)) < 3 * len(lengths) / len(rows)  # a fair sample each, not sorted by length
    assert rows == pack(lengths, capacity, seed=0) != pack(lengths, capacity, seed=1)


def test_best_fit() -> None:
    assert best_fit([6, 4, 3, 3, 2, 2], 10) == [[0, 1], [2, 3, 4, 5]]
    assert best_fit([12, 5, 5], 10) == [[0], [1, 2]]  # too long for any row: one of its own


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    rng = random.Random(1)
    sizes = [rng.randint(1, 60) for _ in range(400)]
    bins = best_fit(sizes, 50)
    rooms: list[int] = []
    for index, size in enumerate(sizes):
        fits = [at for at, room in enumerate(rooms) if room >= size]
        if not fits:
            rooms.append(50)
        chosen = min(fits, key=lambda at: (rooms[at], at)) if fits else len(rooms) - 1
        assert index in bins[chosen]
        rooms[chosen] -= size


def tokenized(folder: Path, use: str) -> TokenizedRows:
    rng = random.Random(2)
    rows = []
    for _ in range(300):
        said = ["".join(rng.choices("你好世界", k=rng.randrange(1, 90))) for _ in range(4)]
        turns = [{"role": "user", "content": said[0]}]
        answers = said[1 : rng.randrange(3, 5)]
        whole = {"messages": [*turns, {"role": "assistant", "content": said[1]}]}
        rows.append(whole if use == "sft" else {"prompt": turns, "answers": answers})
    write_jsonl(folder / "rows.jsonl", rows)
    return tokenize(folder / "rows.jsonl", load_tokenizer(TOKENIZER), Data(), folder / "cache")


@pytest.mark.parametrize("use", ["sft", "reward"])
def test_a_set_keeps_its_rows(tmp_path: Path, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = tokenized(tmp_path, use)
    sequences = [example["sequences"] if use == "reward" else [example["input_ids"]] for example in examples]
    assert examples.lengths() == [[len(sequence) for sequence in each] for each in sequences]
    sizes = [sum(each) for each in examples.lengths()]
    assert sum(sizes) == examples.tokens
    if use == "reward":
        assert [[ids.tolist() for ids in ranking] for ranking in examples.rankings()] == sequences
    rows = examples.packed(512, seed=3)
    plain = PackedRows(list(examples), pack(sizes, 512, 3))
    assert list(rows) == list(plain) and rows[1:3] == plain[1:3]

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack", None)  # not called again
        assert tokenized(tmp_path, use).packed(512, seed=3).rows == rows.rows
    different = [examples.packed(512, seed=4), examples.packed(256, seed=3)]
    halves = [size // 2 for size in sizes]  # what is computed, say
    different.append(examples.packed(512, seed=3, sizes=halves))
    assert different[-1].rows == pack(halves, 512, 3)
    edited = tmp_path / "packing.py"
    edited.write_text("# edited")
    monkeypatch.setattr(packing, "__file__", str(edited))
    examples.packed(512, seed=3)
    assert len(list(examples.folder.glob("packed-*.json"))) == 2 + len(different)
    for path in examples.folder.glob("packed-*.json"):
        assert json.loads(path.read_text())["capacity"] in (256, 512)
