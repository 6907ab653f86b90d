"""Mixtures have the shares that were asked for, and what is chosen depends on nothing but the rows themselves."""

import json
import random
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from glm.config import Data, validate_params
from glm.data.mixing import EVERY, Share, shares, smallest, smallest_by_size
from glm.data.prepare import prepare, split_of
from glm.data.rows import SPLITS, read_split
from glm.data.sources import fetch
from glm.data.text import estimate_tokens, language, normalise
from glm.errors import InputError


def rows(name: str, count: int, words: int = 3) -> list[dict[str, str]]:
    return [{"instruction": f"{name} {i}", "output": f"answer {i} " + "word " * words} for i in range(count)]


def prepared(tmp_path: Path, files: dict[str, list[Any]], **params: Any) -> tuple[dict[str, Any], Path]:
    """Prepare `files` for SFT only."""
    folder = tmp_path / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.jsonl"} for name in files}))
    data = Data(dataset_dir=str(folder), **{"text": [], "reward": list(files), "ppo": list(files), **params})
    data = data.model_copy(update={"reward": [], "ppo": []})
    fetch(list(files), folder, tmp_path / "raw")
    return prepare(data, tmp_path / "raw", tmp_path / "rows")["sft"], tmp_path / "rows"


def counts_add_up(report: dict[str, Any]) -> bool:
    return all(
        counts["read"] == counts["kept"] + sum(counts["dropped"].values())
        and counts["kept"] == sum(counts[split] for split in SPLITS)
        and counts["kept"] == sum(counts["tokens"]["histogram"]["rows"])
        for counts in report.values()
    )


def test_weights_by_examples_take_no_row_twice(tmp_path: Path) -> None:
    report, folder = prepared(
        tmp_path, {"big": rows("b", 900), "small": rows("s", 100)}, sft={"big": 0.7, "small": 0.3}
    )
    assert counts_add_up(report)
    train = read_split(folder, "sft", "train")
    assert len({row["id"] for row in train}) == len(train)
    share = Counter(row["id"].split(":")[0] for row in train)
    assert share["small"] / len(train) == pytest.approx(0.3, abs=0.005)
    assert share["small"] == report["small"]["train"]  # the one that is short for its weight gives all
    assert report["big"]["dropped"] == {"weight": 900 - report["big"]["kept"]}


def test_weights_leave_dev_and_test_alone(tmp_path: Path) -> None:
    files = {"big": rows("b", 900), "small": rows("s", 100)}
    _, weighted = prepared(tmp_path / "a", files, sft={"big": 0.5, "small": 0.5})
    _, plain = prepared(tmp_path / "b", files, sft=["big", "small"])
    for split in ("dev", "test"):
        assert read_split(weighted, "sft", split) == read_split(plain, "sft", split)


def test_all_exhausted_repeats_rows(tmp_path: Path) -> None:
    report, folder = prepared(
        tmp_path,
        {"big": rows("b", 900), "small": rows("s", 100)},
        sft={"big": 0.5, "small": 0.5},
        mix_strategy="all_exhausted",
    )
    assert counts_add_up(report)
    train = Counter(row["id"] for row in read_split(folder, "sft", "train"))
    big = sum(count for row, count in train.items() if row.startswith("big"))
    small = sum(count for row, count in train.items() if row.startswith("small"))
    assert big == small == report["big"]["train"]
    assert max(train.values()) - min(count for row, count in train.items() if row.startswith("small")) <= 1
    assert report["small"]["repeated"] == small - report["small"]["train"]


def test_weights_by_tokens(tmp_path: Path) -> None:
    report, folder = prepared(
        tmp_path,
        {"long": rows("b", 400, words=60), "short": rows("s", 400, words=3)},
        sft={"long": 1, "short": 1},
        mix_by="tokens",
    )
    assert counts_add_up(report)
    tokens = Counter[str]()
    for row in read_split(folder, "sft", "train"):
        tokens[row["id"].split(":")[0]] += sum(estimate_tokens(message["content"]) for message in row["messages"])
    assert tokens["long"] == pytest.approx(tokens["short"], rel=0.05)


def test_shares_are_exact_for_any_sizes_and_weights() -> None:
    generator = random.Random(0)
    for _ in range(200):
        sizes = {name: generator.randrange(1, 300) for name in "abc"}
        weights = {name: generator.choice([0.1, 0.3, 0.6, 1, 7]) for name in "abc"}
        keys = {name: array("Q", (generator.getrandbits(64) for _ in range(size))) for name, size in sizes.items()}
        tokens = {name: array("I", [1] * size) for name, size in sizes.items()}
        for strategy in ("first_exhausted", "all_exhausted"):
            for by in ("examples", "tokens"):
                given = shares(weights, keys, tokens, by, strategy)  # type: ignore[arg-type]
                total = {n: s.passes * sizes[n] + sum(key < s.below for key in keys[n]) for n, s in given.items()}
                scale = {name: total[name] / weights[name] for name in weights}
                for name in weights:
                    assert abs(scale[name] - max(scale.values())) <= 1.01 / weights[name] + 1.01 / min(weights.values())
                if strategy == "first_exhausted":
                    assert all(total[name] <= sizes[name] for name in weights)
                else:
                    assert all(total[name] >= sizes[name] for name in weights)


def test_choices_by_key() -> None:
    keys = array("Q", [50, 10, 40, 30])
    assert smallest(keys, 2) == 40 and smallest(keys, 4) == smallest(keys, 9) == EVERY and smallest(keys, 0) == 10
    assert smallest_by_size(keys, array("I", [1, 5, 5, 5]), 11) == 40
    assert shares({"a": 1}, {"a": array("Q")}, {"a": array("I")}, "examples", "first_exhausted") == {
        "a": Share(0, EVERY)
    }


def test_max_samples_chooses_by_content_and_seed(tmp_path: Path) -> None:
    content = rows("b", 500)

    def chosen(folder: str, content: list[Any], seed: int = 0) -> set[str]:
        _, out = prepared(tmp_path / folder, {"mine": content}, seed=seed, sft=["mine"], max_samples=50)
        found = read_split(out, "sft", "train")
        assert len(found) == 50
        return {row["messages"][0]["content"] for row in found}

    first = chosen("a", content)
    assert chosen("b", content[::-1]) == first  # not the file's head
    assert len(chosen("c", content + rows("c", 50)) & first) > 40  # some of the new ones come in, the rest stays
    assert chosen("d", content, seed=1) != first


def test_duplicates_are_counted_exact_and_near(tmp_path: Path) -> None:
    content = [*rows("b", 200), {"instruction": "What is GLM?", "output": "A model."}]
    near = [
        {"instruction": "what is  glm", "output": "a model"},
        {"instruction": "Ｗhat is GLM？", "output": "A model。"},
        {"instruction": "What is GLM?", "output": "A model."},
    ]
    other = [{"instruction": "What is GLM?", "output": "A family of models."}, {"instruction": "1.5", "output": "x"}]
    report, folder = prepared(tmp_path, {"a": content, "b": [*near, *other]}, sft=["a", "b"])
    assert counts_add_up(report)
    assert report["b"]["dropped"] == {"duplicate": 1, "near duplicate": 2} and report["b"]["duplicates"] == 3
    assert report["b"]["kept"] == 2
    exact, _ = prepared(tmp_path, {"a": content, "b": [*near, *other]}, sft=["a", "b"], deduplicate="exact")
    assert exact["b"]["dropped"] == {"duplicate": 1}
    none, _ = prepared(tmp_path, {"a": content, "b": [*near, *other]}, sft=["a", "b"], deduplicate="none")
    assert none["b"]["dropped"] == {}
    # Questions that are the same but for their spelling are in the same split, whatever is done about duplicates.
    assert len({split_of(row["instruction"], 0.3, 0.3) for row in (*near, content[-1])}) == 1
    questions = {
        split: {normalise(row["messages"][0]["content"]) for row in read_split(folder, "sft", split)}
        for split in SPLITS
    }
    assert not questions["train"] & (questions["dev"] | questions["test"])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Hello, world!", "hello world", True),
        ("你好，世界！", "你好 世界", True),
        ("ＧＬＭ－４", "GLM-4", True),
        ("3 + 5 = ?", "3 - 5 = ?", False),
        ("1.5", "15", False),
        ("1, 2", "12", False),
        ("f(x)", "f[x]", False),
        ("a*b", "a/b", False),
        ("？", "！", False),
        ("第1。2步", "第12步", False),
    ],
)
def test_what_counts_as_the_same_text(a: str, b: str, same: bool) -> None:
    assert (normalise(a) == normalise(b)) is same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天天气很好", "zh"),
        ("用 Python 写一个快速排序函数", "zh"),
        ("The word 你好 means hello in Chinese", "en"),
        ("これは日本語です", "ja"),
        ("한국어 문장", "ko"),
        ("Русский текст", "ru"),
        ("1 + 1 = 2", "none"),
        ("ελληνικά", "other"),
    ],
)
def test_language(text: str, expected: str) -> None:
    assert language(text) == expected


def test_mixtures_in_the_parameters() -> None:
    def data(value: Any) -> Data:
        return validate_params({"data": {"sft": value}}).data

    assert data("a, b").sft == data(["a", "b"]).sft == ["a", "b"]
    assert data({"a": 0.7, "b": 1}).sft == {"a": 0.7, "b": 1.0}
    for wrong, words in [
        ([], "at least 1"),
        ({}, "at least 1"),
        (["a", "a"], "a is named twice"),
        ({"a": 0}, "weight of a must be a number above 0"),
        ({"a": "much"}, "weight of a"),
        ({"a": True}, "weight of a"),
        (3, "expected names of datasets"),
        ([1], "expected names of datasets"),
    ]:
        with pytest.raises(InputError, match=f"data.sft: .*{words}"):
            data(wrong)
