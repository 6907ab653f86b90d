"""The data contract: what is read is kept or counted as dropped, and no question is in two splits."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm.config import Data, load_params
from glm.data.prepare import prepare, split_of
from glm.data.rows import SPLITS, question_of, read_split
from glm.data.sources import fetch
from glm.errors import InputError

ROOT = Path(__file__).parents[2]


def registered(folder: Path, rows: Any, name: str = "rows.json", **entry: Any) -> Path:
    """A dataset folder that holds one dataset, `mine`."""
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows) if name.endswith(".jsonl") else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": name, **entry}}), encoding="utf-8")
    return folder


def prepared(tmp_path: Path, dataset_dir: Path, **uses: list[str]) -> tuple[dict[str, Any], Path]:
    """Fetch and prepare `mine` for the given uses, the other uses from the reviews in the project's registry."""
    own = json.loads((ROOT / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    info = dataset_dir / "dataset_info.json"
    info.write_text(json.dumps(own | json.loads(info.read_text(encoding="utf-8"))), encoding="utf-8")
    params = Data(dataset_dir=str(dataset_dir), max_samples=8, **uses)
    fetch([*params.text, *params.sft, *params.reward, *params.ppo], dataset_dir, tmp_path / "raw")
    return prepare(params, tmp_path / "raw", tmp_path / "rows"), tmp_path / "rows"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("reviews")
    params = load_params(ROOT / "params.yaml").data
    fetch([*params.text, *params.sft, *params.reward, *params.ppo], ROOT / "data", folder / "raw")
    return prepare(params, folder / "raw", folder / "rows"), folder / "rows"


def test_counts_add_up(reviews: tuple[dict[str, Any], Path]) -> None:
    report, folder = reviews
    for use, datasets in report.items():
        for counts in datasets.values():
            assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
        for split in SPLITS:
            assert sum(counts[split] for counts in datasets.values()) == len(read_split(folder, use, split)) > 30


def test_no_question_answer_or_text_stands_in_two_splits(reviews: tuple[dict[str, Any], Path]) -> None:
    _, folder = reviews
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for use in ("text", "sft", "reward", "ppo"):
            for row in read_split(folder, use, split):
                seen[split].add(question_of(row))
                seen[split] |= set(row.get("answers", [])) | {m["content"] for m in row.get("messages", [])[1:]}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["dev"]
    assert not seen["dev"] & seen["test"]


def test_a_split_does_not_move_when_another_dataset_is_added(tmp_path: Path) -> None:
    rows = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(200)]
    _, alone = prepared(tmp_path / "a", registered(tmp_path / "one", rows), sft=["mine"])
    _, beside = prepared(tmp_path / "b", registered(tmp_path / "two", rows), sft=["reviews_sft", "mine"])
    for split in SPLITS:
        mine = {row["id"] for row in read_split(beside, "sft", split) if row["id"].startswith("mine")}
        assert mine == {row["id"] for row in read_split(alone, "sft", split)}


def test_split_shares_are_as_asked() -> None:
    found = [split_of(f"question {i}", 0.1, 0.2) for i in range(5000)]
    assert found.count("test") / 5000 == pytest.approx(0.2, abs=0.02)
    assert found.count("dev") / 5000 == pytest.approx(0.1, abs=0.02)


def test_columns_name_the_file_s_own_fields(tmp_path: Path) -> None:
    rows = [{"content": f"c{i}", "summary": f"s{i}", "output": "not this one"} for i in range(100)]
    folder = registered(tmp_path / "data", rows, columns={"prompt": "content", "response": "summary"})
    _, out = prepared(tmp_path, folder, sft=["mine"])
    row = read_split(out, "sft", "train")[0]
    assert row["messages"][0]["content"][0] == "c" and row["messages"][1]["content"][0] == "s"


def test_every_unusable_row_is_counted_with_its_reason(tmp_path: Path) -> None:
    good = [{"instruction": f"question {i}", "output": "answer"} for i in range(100)]
    bad = [
        {"instruction": "", "output": "a"},
        {"instruction": "q", "output": "  "},
        {"instruction": "q"},
        {"instruction": 3, "output": "a"},
        {"instruction": "q", "output": "a", "history": [["only one"]]},
        "text",
        good[0],
    ]
    report, _ = prepared(tmp_path, registered(tmp_path / "data", good + bad), sft=["mine"])
    dropped = report["sft"]["mine"]["dropped"]
    assert report["sft"]["mine"]["read"] == 107
    assert dropped.pop("max_samples") == 107 - len(bad) - report["sft"]["mine"]["kept"]
    assert dropped == {
        "empty question": 1,
        "empty answer": 1,
        "no answer: no column 'output' among 'instruction'": 1,
        "instruction is int, not text": 1,
        "history is not a list of [question, answer] pairs": 1,
        "row is str, not an object": 1,
        "duplicate": 1,
    }


def test_a_file_that_does_not_parse_is_named_with_its_line(tmp_path: Path) -> None:
    folder = registered(tmp_path / "data", [{"instruction": "q", "output": "a"}], "rows.jsonl")
    with (folder / "rows.jsonl").open("a") as file:
        file.write('\n{"instruction": "q"')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: not valid JSON"):
        prepared(tmp_path, folder, sft=["mine"])
    assert not (tmp_path / "rows").exists()
