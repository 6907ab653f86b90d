"""Every format and file kind that users bring becomes the same rows; what does not fit is told by file and line."""

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from glm.data import readers
from glm.data.contract import UnusableError, validate
from glm.data.converters import CONVERTERS
from glm.data.raw_rows import Read, read_rows
from glm.data.readers import read_file
from glm.data.registry import Entry
from glm.data.rows import Use
from glm.errors import InputError


def said(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its id, messages as (role, content)."""

    def pairs(value: Any) -> Any:
        if isinstance(value, list) and isinstance(value[0], dict):
            return [(message["role"], message["content"]) for message in value]
        return value

    return {key: pairs(value) for key, value in row.items() if key != "id"}


def read(folder: Path, rows: list[Any], use: Use, name: str = "rows.jsonl", **entry: Any) -> list[Read]:
    """What becomes of rows that stand in one JSON-lines file."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_rows("mine", Entry(file_name=name, **entry), folder, use))


USER, ANSWER = [("user", "q")], [("user", "q"), ("assistant", "a")]
PAIR = {"prompt": USER, "answers": ["1", "2"]}
FORMATS: list[tuple[Use, dict[str, Any], dict[str, Any]]] = [
    (
        "sft",
        {"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]]},
        {"messages": [("user", "q"), ("assistant", "r"), ("user", "ab"), ("assistant", "c")]},
    ),
    ("sft", {"instruction": "q", "input": None, "output": "a", "history": None}, {"messages": ANSWER}),
    ("sft", {"instruction": "q", "output": "a", "system": "s"}, {"messages": [("system", "s"), *ANSWER]}),
    (
        "sft",
        {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]},
        {"messages": [(r, r) for r in ("system", "user", "assistant")]},
    ),
    (
        "sft",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"messages": ANSWER},
    ),
    (
        "sft",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": ANSWER},
    ),
    ("sft", {"prompt": "q", "completion": "a"}, {"messages": ANSWER}),
    (
        "sft",
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"messages": ANSWER},
    ),
    ("sft", {"instruction": "q", "output": ["best", "worst"]}, {"messages": [*USER, ("assistant", "best")]}),
    ("sft", {"prompt": "q", "completion": "a", "label": True}, {"messages": ANSWER}),
    (
        "sft",
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
            "tools": "[]",
        },
        {"messages": [("system", "s"), *ANSWER]},
    ),
    (
        "sft",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"messages": [("system", "s"), *ANSWER]},
    ),
    (
        "sft",
        {"messages": None, "prompt": "q", "completion": "a", "chosen": None, "rejected": None},
        {"messages": ANSWER},
    ),
    ("reward", {"instruction": "q", "output": ["1", "2", "3"]}, {"prompt": USER, "answers": ["1", "2", "3"]}),
    ("reward", {"prompt": "q", "completion": ["1", "2"]}, PAIR),
    ("reward", {"prompt": "q", "chosen": "1", "rejected": "2"}, PAIR),
    ("reward", {"instruction": "q", "input": "", "chosen": "1", "rejected": "2"}, PAIR),
    (
        "reward",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "1"},
            "rejected": {"from": "gpt", "value": "2"},
        },
        PAIR,
    ),
    (
        "reward",
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "2"}],
        },
        PAIR,
    ),
    (
        "reward",
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "1"}],
            "rejected": [{"role": "assistant", "content": "2"}],
        },
        PAIR,
    ),
    (
        "reward",
        {
            "prompt": "q",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "2"}],
        },
        PAIR,
    ),
    ("ppo", {"instruction": "q"}, {"prompt": USER, "answer": None}),
    ("ppo", {"instruction": "q", "output": ""}, {"prompt": USER, "answer": None}),
    ("ppo", {"instruction": "q", "output": "a"}, {"prompt": USER, "answer": "a"}),
    ("ppo", {"prompt": "q"}, {"prompt": USER, "answer": None}),
    ("ppo", {"text": "q"}, {"prompt": USER, "answer": None}),
    ("ppo", {"messages": [{"role": "user", "content": "q"}]}, {"prompt": USER, "answer": None}),
    ("ppo", {"prompt": "q", "completion": "a", "label": False}, {"prompt": USER, "answer": None}),
    ("kto", {"prompt": "q", "completion": "a", "label": False}, {"prompt": USER, "answer": "a", "label": False}),
    ("kto", {"instruction": "q", "output": "a", "label": 1}, {"prompt": USER, "answer": "a", "label": True}),
    ("text", {"text": "words"}, {"text": "words"}),
]


@pytest.mark.parametrize(("use", "raw", "expected"), FORMATS)
def test_formats(tmp_path: Path, use: Use, raw: dict[str, Any], expected: dict[str, Any]) -> None:
    [found] = read(tmp_path, [raw], use)
    assert found.row is not None, found.reason
    assert said(found.row) == expected
    assert found.row["id"] == "mine:rows.jsonl:1"


UNFIT: list[tuple[Use, Any, str]] = [
    ("sft", "text", "row is str, not an object"),
    ("sft", None, "row is null, not an object"),
    ("sft", {"instruction": "q", "output": None}, "no answer"),
    ("sft", {"instruction": "q", "response": "a"}, "no answer: no column 'output' among 'instruction', 'response'"),
    ("sft", {"prompt": "q"}, "no answer: no column 'completion' among 'prompt'"),
    (
        "sft",
        {"data": []},
        "no column 'instruction' or 'input' or 'prompt' or 'messages' or 'conversations' among 'data'",
    ),
    ("sft", {"instruction": " ", "output": "a"}, "empty question"),
    ("sft", {"instruction": "q", "output": "\n"}, "empty answer"),
    ("sft", {"instruction": 3, "output": "a"}, "instruction is int, not text"),
    ("sft", {"instruction": "q", "output": {"a": 1}}, "output is dict, not text"),
    (
        "sft",
        {"instruction": "q", "output": "a", "history": [["one"]]},
        "history is not a list of [question, answer] pairs",
    ),
    ("sft", {"instruction": "q", "output": "a", "history": "h"}, "history is str, not a list"),
    ("sft", {"messages": []}, "no question before the answer"),
    ("sft", {"messages": [{"role": "assistant", "content": "a"}]}, "no question before the answer"),
    ("sft", {"messages": [{"role": r, "content": "x"} for r in ("user", "user", "assistant")]}, "do not alternate"),
    (
        "sft",
        {"messages": [{"role": "wizard" * 99, "content": "x"}]},
        "unknown role 'wizardwizardwizardwi'; known: system",
    ),
    ("sft", {"messages": [{"role": ["user"], "content": "x"}]}, "role is list, not text"),
    ("sft", {"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight 0"),
    ("sft", {"conversations": [{"from": "human", "value": "x"}], "tools": '[{"name": "f"}]'}, "offers tools"),
    ("sft", {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "1"}]}, "calls tools"),
    (
        "sft",
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [1]}]},
        "calls tools",
    ),
    ("sft", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "something else than text"),
    ("sft", {"instruction": "q", "output": "\ud800"}, "not valid Unicode"),
    ("sft", {"prompt": "q", "completion": "a", "label": False}, "labelled bad"),
    (
        "reward",
        {"prompt": "q", "chosen": "a", "rejected": None},
        "no ranked answers among 'chosen', 'prompt', 'rejected'",
    ),
    ("reward", {"instruction": "q", "output": "a"}, "fewer than two ranked answers"),
    ("reward", {"instruction": "q", "output": ["a"]}, "fewer than two ranked answers"),
    ("reward", {"instruction": "q", "output": ["a", "a"]}, "ranked answers are equal"),
    ("reward", {"instruction": "q", "output": ["a", " "]}, "empty answer"),
    (
        "reward",
        {
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "1"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "2"}],
        },
        "chosen and rejected answer different dialogues",
    ),
    ("kto", {"prompt": "q", "completion": "a"}, "no label"),
    ("kto", {"prompt": "q", "completion": "a", "label": "good"}, "label is neither true nor false"),
    ("text", {"text": ""}, "empty text"),
    ("text", {"words": "x"}, "no text: no column 'text' among 'words'"),
]


@pytest.mark.parametrize(("use", "raw", "reason"), UNFIT)
def test_what_cannot_serve_is_dropped_for_a_reason(tmp_path: Path, use: Use, raw: Any, reason: str) -> None:
    [found] = read(tmp_path, [raw], use)
    assert found.row is None and not found.broken
    assert reason in found.reason


def test_columns_follow_the_reference_s_rule(tmp_path: Path) -> None:
    """A role that `columns` leaves out, or maps to "", has no column, whatever the file holds."""
    raw = {"content": "c", "summary": "s", "instruction": "no", "input": "no", "output": "no", "history": [["n", "o"]]}
    columns = {"prompt": "content", "query": "", "response": "summary"}
    [found] = read(tmp_path, [raw], "sft", columns=columns)
    assert found.row is not None
    assert said(found.row) == {"messages": [("user", "c"), ("assistant", "s")]}


def test_columns_of_a_pair_that_brings_its_prompt_along(tmp_path: Path) -> None:
    raw = {
        name: [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}] for name in ("better", "worse")
    }
    [found] = read(tmp_path, [raw], "reward", columns={"chosen": "better", "rejected": "worse"})
    assert found.row is not None
    assert said(found.row) == {"prompt": USER, "answers": ["better", "worse"]}


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    """It may be missing in some rows: in JSON an optional field is often left out."""
    rows = [{"q": "1", "a": "2"}, {"q": "1", "a": "3", "before": [["x", "y"]]}]
    columns = {"prompt": "q", "response": "a", "history": "before"}
    assert all(found.row for found in read(tmp_path, rows, "sft", columns=columns))
    with pytest.raises(
        InputError, match=r"'mine': its columns .* name 'befor', which no row has; rows have 'a', 'before'"
    ):
        read(tmp_path, rows, "sft", columns=columns | {"history": "befor"})


def test_the_contract_refuses_what_no_format_makes() -> None:
    with pytest.raises(UnusableError, match="does not end with a question"):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        validate("ppo", {"prompt": turns, "answer": None})
    with pytest.raises(UnusableError, match=r"label.*valid boolean"):
        validate("kto", {"prompt": [{"role": "user", "content": "q"}], "answer": "a", "label": "yes"})


# ---- the reference's scripted datasets


def test_hh_rlhf() -> None:
    before = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three"
    raw = {"chosen": f"{before}\n\nAssistant: good ", "rejected": f"{before}\n\nAssistant: bad"}
    expected = {"instruction": "three", "output": ["good", "bad"], "history": [["one", "two"]]}
    assert CONVERTERS["hh_rlhf_en"](raw) == expected
    with pytest.raises(UnusableError, match="do not alternate"):
        CONVERTERS["hh_rlhf_en"]({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "x"})


def test_belle_multiturn() -> None:
    raw = {"instruction": "Human:一\nAssistant:二\nHuman:三\nAssistant:", "input": "", "output": " 四 "}
    expected = {"instruction": "三", "output": "四", "history": [["一", "二"]]}
    assert CONVERTERS["belle_multiturn"](raw) == expected


def test_ultra_chat() -> None:
    convert = CONVERTERS["ultra_chat"]
    assert convert({"id": "0", "data": ["a", "b", "c", "d", "e"]}) == {
        "instruction": "c",
        "output": "d",
        "history": [["a", "b"]],
    }
    with pytest.raises(UnusableError, match="fewer than two turns"):
        convert({"id": "0", "data": ["a"]})


def test_baize() -> None:
    text = "The conversation between human and AI assistant.\n[|Human|] a\n[|AI|] b\n[|Human|] c\n[|AI|] d\n[|Human|] "
    expected = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    assert CONVERTERS["baize"]({"chat_sample": text}) == expected == CONVERTERS["baize"]({"input": text})


def test_only_ultra_chat_s_lines_that_are_no_json_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"data": ["a", "b"]}\n{"data": \n', encoding="utf-8")
    good, bad = read_rows("mine", Entry(file_name="rows.jsonl", format="ultra_chat"), tmp_path, "sft")
    assert good.row is not None and bad.line == 2 and bad.reason.startswith("not valid JSON") and not bad.broken
    assert list(read_rows("mine", Entry(file_name="rows.jsonl"), tmp_path, "sft"))[1].broken


# ---- files


ROWS = [{"instruction": f"问 {i}", "input": "", "output": 'an "answer",\nin two lines'} for i in range(5)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the way that the file's name says."""
    text = path.name.removesuffix(".gz").removesuffix(".zst")
    if text.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if text.endswith(".csv"):
        plain = path.with_name("plain.csv")
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        content = plain.read_bytes()
        plain.unlink()
    elif text.endswith(".jsonl"):
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    else:
        content = json.dumps(rows, indent=1, ensure_ascii=False).encode("utf-8-sig")
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.json.zst"],
)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    assert [raw.value for raw in read_file(tmp_path / name)] == ROWS


def test_a_json_file_of_one_object_a_line_is_read_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [raw.value for raw in read_file(tmp_path / "a.json")] == ROWS


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
def test_a_json_list_is_read_alike_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    values = [*ROWS, {"n": [1, -2.5e10, True, None], "s": '\\ " ] , 😀 \u2028'}, "text", 12345, [], {}]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.setattr(readers, "BLOCK", block)
    for name in ("a.json", "b.json"):
        raws = list(read_file(tmp_path / name))
        assert [raw.value for raw in raws] == values and not any(raw.fault for raw in raws)
    lines = (tmp_path / "a.json").read_text(encoding="utf-8").split("\n")
    for raw in read_file(tmp_path / "a.json"):
        assert raw.line is not None and lines[raw.line - 1].strip().rstrip(",") in ("{", '"text"', "12345", "[]", "{}")


EMPTY = [
    ("a.json", b""),
    ("a.json", b"\xef\xbb\xbf \n"),
    ("a.json", b"[ ]"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ("a.csv", b"a,b\r\n"),
]
BROKEN = [
    ("a.jsonl", b'{"a": 1}\n\n{"a": \n{"a": 3}\n', [None, (3, "not valid JSON"), None]),
    ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\xff"}\r\n', [None, (2, "not UTF-8")]),
    ("a.jsonl", b'{"a": %s}\n{"a": 1}' % (b"1" * 5000), [(1, "not valid JSON"), None]),
    ("a.jsonl", b'{"a": ' + b"[" * 99999 + b"\n1", [(1, "nested too deeply"), None]),
    ("a.json", b'[{"a": %s}, 1]' % (b"1" * 5000), [(1, "the rest of the file is not read")]),
    ("a.json", b'[{"a": 1}]\n\n[{"a": 2}]', [None, (3, "the list has ended, but '[' follows")]),
    ("a.jsonl", b'[{"a": 1},\n{"a": 2}]\n', [None, None]),
    ("a.json", '{"a": "字"}\n'.encode("utf-16"), [(None, "UTF-16 text: convert it to UTF-8")]),
    ("a.csv", "a,b\n1,2\n".encode("utf-16-be").replace(b"\0a", b"\xfe\xff\0a", 1), [(None, "UTF-16 text")]),
    ("a.jsonl", gzip.compress(b'{"a": 1}', mtime=0), [(None, "gzip data: its name must end in .gz")]),
    ("a.csv", b"PAR1", [(None, "not a .csv file but Parquet data")]),
    ("a.json", b"version https://git-lfs.github.com/spec/v1\noid", [(None, "`git lfs pull`")]),
    *((name, content, [(None, "the file holds no rows")]) for name, content in EMPTY),
    ("a.csv", b"a,b,a\n1,2,3\n", [(1, "names 'a' twice")]),
    ("a.csv", b"\na,b\n\n1,2\n\n1\n", [None, (6, "1 fields, the header has 2")]),
    ("a.json", b'[\n {"a": 1},\n {"a" 2}\n]', [None, (3, "not valid JSON")]),
    ("a.json", b'[\n {"a": 1},\n {"a": "2', [None, (3, "not valid JSON")]),
    ("a.json", b'[{"a": 1}\n {"a": 2}]', [None, (2, "expected , or ]")]),
    ("a.json", b'[{"a": 1},\n', [None, (2, "not valid JSON")]),
    ("a.json", b'[{"a": 1},\n {"a": "\xff\xfe"},\n{"a": 3}]', [None, (2, "not UTF-8"), None]),
    ("a.csv", b"a,b\n1,2\n1,\xff\n3,4\n", [None, (3, "not UTF-8"), None]),
    ("a.csv", b"a,b\n1,2\n1,2,3\n1\n", [None, (3, "3 fields, the header has 2"), (4, "1 fields")]),
    ("a.csv", b'a,b\n"1\n1",2\n"3,4\n', [None, (4, "not valid CSV")]),
    ("a.parquet", b"PAR1 is not enough", [(None, "not valid Parquet")]),
    ("a.jsonl.gz", b"not gzip", [(None, "cannot be read")]),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:40], [(None, "cannot be read")]),
]


@pytest.mark.parametrize(("name", "content", "expected"), BROKEN)
def test_a_broken_row_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, expected: list[tuple[int | None, str] | None]
) -> None:
    (tmp_path / name).write_bytes(content)
    raws = list(read_file(tmp_path / name))
    faults = [raw for raw in raws if raw.fault]
    wanted = [fault for fault in expected if fault]
    if not name.endswith(".gz"):
        assert len(raws) == len(expected)
    assert len(faults) == len(wanted)
    for raw, (line, words) in zip(faults, wanted, strict=True):
        assert raw.line == line and words in raw.fault


def test_an_unclosed_quote_does_not_pull_in_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK", 100)
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    (tmp_path / "a.json").write_text('[{"a": 1},\n{"a": "x' + "y" * 5000)
    good, bad = read_file(tmp_path / "a.json")
    assert not good.fault and bad.line == 2 and "Unterminated string" in bad.fault


def test_a_line_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_ROW", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "y" * 5000)
    good, bad = read_file(tmp_path / "a.jsonl")
    assert not good.fault and bad.line == 2 and "longer than 100 bytes; the rest of the file is not read" in bad.fault


def test_all_members_of_a_compressed_file_are_read(tmp_path: Path) -> None:
    """As `cat a.gz b.gz` and block-wise compressors write them."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))
    frames = [pyarrow.compress(b'{"a": %d}\n' % at, codec="zstd", asbytes=True) for at in (1, 2)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert [raw.value for raw in read_file(tmp_path / name)] == [{"a": 1}, {"a": 2}]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xls").write_text("")
    with pytest.raises(InputError, match=r"a\.xls: rows are read from"):
        next(read_file(tmp_path / "a.xls"))


@pytest.mark.parametrize("spell", [json.dumps, repr])
def test_lists_in_csv_cells(tmp_path: Path, spell: Any) -> None:
    """CSV has no lists: history, messages and rankings stand in a cell as JSON or in Python's spelling."""
    rows = [{"instruction": "q", "input": "", "output": spell(["1", "2"]), "history": spell([["a", "b"]])}]
    write(tmp_path / "a.csv", rows)
    entry = Entry(file_name="a.csv")
    [ranking] = read_rows("mine", entry, tmp_path, "reward")
    assert ranking.row is not None and ranking.row["answers"] == ["1", "2"] and len(ranking.row["prompt"]) == 3
    own = {"prompt": "question", "response": "answers", "history": "before"}
    write(tmp_path / "a.csv", [{"question": "q", "answers": spell(["1", "2"]), "before": spell([["a", "b"]])}])
    [named] = read_rows("mine", Entry(file_name="a.csv", columns=own), tmp_path, "reward")
    assert named.row is not None and named.row == ranking.row
    write(tmp_path / "a.csv", rows)
    [dialogue] = read_rows("mine", entry, tmp_path, "sft")  # there an answer that looks like a list is a text
    assert dialogue.row is not None and dialogue.row["messages"][-1]["content"] == spell(["1", "2"])


def test_random_rows_survive_every_kind_of_file(tmp_path: Path) -> None:
    generator = random.Random(0)
    alphabet = "ab 1,\"'\\[]{}\n\t问答。🙂\u00a0"
    rows = [
        {
            key: "x" + "".join(generator.choices(alphabet, k=generator.randrange(30)))
            for key in ("instruction", "output")
        }
        for _ in range(50)
    ]
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.zst"):
        write(tmp_path / name, rows)
        assert [raw.value for raw in read_file(tmp_path / name)] == rows, name
