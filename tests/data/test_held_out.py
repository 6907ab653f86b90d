"""A test row that was trained on is found by its content, whatever file it came from."""

from pathlib import Path
from typing import Any

import pytest

from glm.data.held_out import check_disjoint
from glm.errors import InputError
from glm.files import write_jsonl


def row(name: str, question: str, answer: str = "好") -> dict[str, Any]:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": said}


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    for name, rows in splits.items():
        write_jsonl(folder / "sft" / f"{name}.jsonl", rows)
    return folder


def test_different_questions_pass(tmp_path: Path) -> None:
    write(tmp_path, train=[row("a", "写一条酒店评论")], test=[row("b", "写一条书籍评论")])
    check_disjoint(tmp_path, "sft")


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_question_seen_in_training_is_named(tmp_path: Path, split: str) -> None:
    write(
        tmp_path,
        **{"train": [], split: [row("a", "１＋１ 等于几？", "二")]},
        test=[row("b", "写一条评论"), row("c", "1+1等于几", "2")],
    )
    with pytest.raises(InputError, match=rf"1 of 2 held-out rows are in {split} too, such as 'c'.*dvc repro"):
        check_disjoint(tmp_path, "sft")


def test_an_answer_that_the_base_model_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, train=[row("a", "甲")], test=[row("b", "乙", "房间很干净。")])
    write_jsonl(tmp_path / "text" / "train.jsonl", [{"text": "房间，很干净"}])
    with pytest.raises(InputError, match="text that the base model read too, such as 'b'"):
        check_disjoint(tmp_path, "sft")
