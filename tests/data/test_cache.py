"""The cache of tokenised rows: equal to encoding row by row, found by content alone, whole or not at all."""

import fcntl
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from glm.config import Data
from glm.data import cache, encode_file
from glm.data.batch_encode import RowEncoder
from glm.data.cache import cache_key, tokenize
from glm.data.encode import IGNORED, MARGIN, encode_row
from glm.errors import InputError
from glm.models import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = [
    "你好",
    "写一个快速排序",
    "hello world",
    "  两个空格",
    "[gMASK]",
    "<|user|>",
    "\n\n问：",
    "答：",
    "🙂",
    "1.5",
    "▁",
    "ï¼",
    "\t",
]


def tokenizer_of(generation: str) -> Any:
    return load_tokenizer(GOLDEN / f"tokenizer-{generation}-tiny")


def random_rows(count: int) -> list[dict[str, Any]]:
    """Rows of every shape: dialogues, rankings, prompts and labelled answers; short, long, and with odd texts."""
    generator = random.Random(1)

    def text() -> str:
        words = generator.choices(WORDS, k=generator.choice([1, 2, 4, 30, 90]))
        return generator.choice(["", " "]).join(words) + "字"

    def dialogue() -> list[dict[str, str]]:
        turns = [
            {"role": r, "content": text()} for _ in range(generator.choice([1, 1, 2, 4])) for r in ("user", "assistant")
        ]
        return [{"role": "system", "content": generator.choice(WORDS)}, *turns] if generator.random() < 0.3 else turns

    rows: list[dict[str, Any]] = []
    for number in range(count):
        messages = dialogue()
        rows.append(
            [
                {"messages": messages},
                {"prompt": messages[:-1], "answers": [text(), text(), text()]},
                {"prompt": messages[:-1], "answer": None},
                {"prompt": messages[:-1], "answer": text(), "label": bool(number % 8 < 4)},
            ][number % 4]
        )
    return rows


@pytest.mark.parametrize("generation", ["chatglm1", "chatglm2", "chatglm3"])
@pytest.mark.parametrize("limits", [(512, 512), (120, 60)])
def test_the_fast_encoder_equals_the_plain_one(generation: str, limits: tuple[int, int]) -> None:
    tokenizer = tokenizer_of(generation)
    for prefix in ("", "你是助手。"):
        params = Data(max_source_length=limits[0], max_target_length=limits[1], source_prefix=prefix)
        encoder = RowEncoder(tokenizer, params)
        assert encoder.is_fast is (generation != "chatglm1")
        rows = random_rows(80)
        assert encoder(rows) == [encode_row(tokenizer, row, params) for row in rows]


@pytest.mark.parametrize("generation", ["chatglm1", "chatglm2", "chatglm3"])
def test_a_row_encoded_at_once_equals_a_row_that_is_fitted(generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short cut for rows within the limits is a short cut only."""
    from glm.data import encode

    tokenizer, params = tokenizer_of(generation), Data()
    rows = [row for row in random_rows(120) if "messages" in row]
    quick = [encode_row(tokenizer, row, params) for row in rows]
    monkeypatch.setattr(encode, "_uncut", lambda *_: None)
    assert quick == [encode_row(tokenizer, row, params) for row in rows]


def test_a_prompt_alone_is_about_as_long_as_within_its_dialogue() -> None:
    """What MARGIN stands for."""
    for generation in ("chatglm1", "chatglm2", "chatglm3"):
        tokenizer, params = tokenizer_of(generation), Data(max_source_length=4096, max_target_length=4096)
        for row in random_rows(60):
            if "messages" in row:
                labels = encode_row(tokenizer, row, params)["labels"]
                answer_at = max(at for at, label in enumerate(labels) if label == IGNORED) + 1
                prompt = encode_row(tokenizer, {"prompt": row["messages"][:-1], "answer": None}, params)["input_ids"]
                assert abs(len(prompt) - answer_at) < MARGIN


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Prepared SFT rows."""
    path = tmp_path / "rows" / "sft" / "train.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"id": f"a:b:{at}", **row} for at, row in enumerate(random_rows(240)) if "messages" in row]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_cached_rows_are_the_encoded_ones(rows_file: Path, tmp_path: Path) -> None:
    tokenizer, params = tokenizer_of("chatglm2"), Data(max_source_length=200, max_target_length=100)
    seen: list[tuple[int, int, str]] = []
    found = tokenize(rows_file, tokenizer, params, tmp_path / "cache", progress=lambda *state: seen.append(state))
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    expected = [encode_row(tokenizer, row, params) for row in rows]
    assert len(found) == len(expected) == 60
    assert list(found) == expected and found[-1] == expected[-1]
    assert found[3:8] == expected[3:8] == found.__getitems__([3, 4, 5, 6, 7])
    assert found.truncated == sum(example["truncated"] for example in expected) > 0
    assert found.tokens == sum(len(example["input_ids"]) for example in expected)
    assert seen[-1] == (60, 60, "tokenizing sft/train.jsonl")


@pytest.mark.parametrize("use", ["answers", "answer", "label"])
def test_the_other_uses(tmp_path: Path, use: str) -> None:
    tokenizer, params = tokenizer_of("chatglm3"), Data()
    rows = [row for row in random_rows(80) if use in row and ("label" in row) is (use == "label")]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tokenize(path, tokenizer, params, tmp_path / "cache")
    assert list(found) == [encode_row(tokenizer, row, params) for row in rows]


def test_several_processes_write_the_same_bytes(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_file, "CHUNK", 7)
    tokenizer = tokenizer_of("chatglm2")
    key, _ = cache_key(rows_file, tokenizer, Data())
    for processes in (1, 2):
        tokenize(rows_file, tokenizer, Data(), tmp_path / str(processes), processes=processes)
    one, two = (tmp_path / str(processes) / key for processes in (1, 2))
    assert (one / "data.arrow").read_bytes() == (two / "data.arrow").read_bytes()
    assert (one / "meta.json").read_bytes() == (two / "meta.json").read_bytes()


def test_an_empty_split(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text("")
    found = tokenize(tmp_path / "dev.jsonl", tokenizer_of("chatglm2"), Data(), tmp_path / "cache")
    assert len(found) == 0 and not found and list(found) == []


def test_the_key_depends_on_content_alone(rows_file: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatglm2")
    key = cache_key(rows_file, tokenizer, Data())[0]

    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.copy(rows_file, clone / "other name.jsonl")
    shutil.copytree(GOLDEN / "tokenizer-chatglm2-tiny", clone / "tokenizer")
    unrelated = Data(max_samples=9, dev_ratio=0.3, sft=["other"])
    assert cache_key(clone / "other name.jsonl", load_tokenizer(clone / "tokenizer"), unrelated)[0] == key

    keys = {key}
    for params in (Data(max_source_length=100), Data(max_target_length=100), Data(source_prefix="x")):
        keys.add(cache_key(rows_file, tokenizer, params)[0])
    for other in ("chatglm1", "chatglm3"):
        keys.add(cache_key(rows_file, tokenizer_of(other), Data())[0])
    changed = tokenizer_of("chatglm2")
    changed.chat_template = changed.chat_template.replace("问：", "Q: ")
    keys.add(cache_key(rows_file, changed, Data())[0])
    extended = tokenizer_of("chatglm2")
    extended.add_tokens(["<new>"])
    keys.add(cache_key(rows_file, extended, Data())[0])
    text = rows_file.read_text(encoding="utf-8")
    rows_file.write_text(text.replace("你好", "您好", 1), encoding="utf-8")
    keys.add(cache_key(rows_file, tokenizer, Data())[0])
    assert len(keys) == 9


def test_edited_code_of_the_encoder_misses(rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache_key(rows_file, tokenizer_of("chatglm2"), Data())[0]
    edited = tmp_path / "encode.py"
    edited.write_text("# edited")
    monkeypatch.setattr("glm.data.encode.__file__", str(edited))
    assert cache_key(rows_file, tokenizer_of("chatglm2"), Data())[0] != key


def test_interrupted_work_leaves_nothing_and_is_done_again(rows_file: Path, tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done:
            raise Interrupted

    with pytest.raises(Interrupted):
        tokenize(rows_file, tokenizer_of("chatglm2"), Data(), tmp_path / "cache", progress=stop)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(tokenize(rows_file, tokenizer_of("chatglm2"), Data(), tmp_path / "cache")) == 60


def test_a_row_that_cannot_be_encoded_is_an_input_error(rows_file: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        with pytest.raises(InputError, match="max_source_length 16 is too small"):
            params = Data(max_source_length=16, source_prefix="很长的系统提示" * 9)
            tokenize(rows_file, tokenizer_of("chatglm2"), params, tmp_path / "cache", processes=processes)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def _run(rows_file: Path, folder: Path) -> None:
    def slow(done: int, total: int, text: str) -> None:
        if "waiting" in text:
            (folder / f"waited-{time.monotonic_ns()}").touch()
        elif done == 0:
            (folder / f"worked-{time.monotonic_ns()}").touch()
            time.sleep(0.5)

    assert len(tokenize(rows_file, tokenizer_of("chatglm2"), Data(), folder, progress=slow)) == 60


def test_two_runs_at_once_do_the_work_once(rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_run, args=(rows_file, tmp_path / "cache")) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    assert len(list((tmp_path / "cache").glob("worked-*"))) == 1


def test_old_sets_are_removed_unless_a_run_is_at_them(rows_file: Path, tmp_path: Path) -> None:
    folder, tokenizer = tmp_path / "cache", tokenizer_of("chatglm2")
    old, locked, used = (
        tokenize(rows_file, tokenizer, Data(max_source_length=length), folder).folder for length in (300, 310, 320)
    )
    (folder / f".{old.name}.killed").mkdir()
    long_ago = time.time() - 31 * 86400
    for path in (old, locked, used):
        os.utime(path, (long_ago, long_ago))
    tokenize(rows_file, tokenizer, Data(max_source_length=320), folder)  # found again: that is a use
    with open(folder / f"{locked.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_rows = cache.read(old)
        new = tokenize(rows_file, tokenizer, Data(max_source_length=330), folder).folder
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {locked.name, used.name, new.name}
    assert len(list(open_rows)) == 60  # the run that has it goes on
    assert cache.clean(folder).keys() == {locked.name}
    assert cache.clean(folder, days=0).keys() == {used.name, new.name}
    assert len(tokenize(rows_file, tokenizer, Data(max_source_length=320), folder)) == 60
