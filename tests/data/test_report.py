"""The report: complete, readable on its own, and the same from the check as from the pipeline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm.config import Data
from glm.data.check import broken_rows, check, main, summary
from glm.data.report_page import page
from glm.data.token_counter import TokenizerCounter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Good, bad and broken rows, one of them far longer than the limits, one with HTML in it."""
    rows: list[Any] = [{"instruction": f"问题 {i}", "output": f"回答 {i}"} for i in range(60)]
    rows += [{"instruction": "<script>alert(1)</script>" + "长" * 900, "output": "短"}, {"instruction": "q"}, [1]]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"instruction": \n{"output"}\n'
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.jsonl"}}))
    params = Data(dataset_dir=str(folder), text=[], sft=["mine"])
    return params.model_copy(update={"reward": [], "ppo": []})


def test_the_check_counts_every_broken_row(data: Data, tmp_path: Path) -> None:
    report = check(data, tmp_path / "out")
    counts = report["sft"]["mine"]
    assert counts["read"] == 65 == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] == 61 and counts["broken"] == broken_rows(report) == 2
    lines = {row["line"]: row["reason"] for row in counts["dropped_rows"]}
    assert lines.keys() == {62, 63, 64, 65} and lines[62].startswith("no answer") and "not valid JSON" in lines[64]
    assert counts["truncated"] == 1
    assert counts["longest"][0]["id"] == "mine:rows.jsonl:61"
    assert counts["languages"] == {"zh": 1.0}
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    assert "mine:rows.jsonl:64, line 64: not valid JSON" in summary(report)


def test_the_page_needs_nothing_beside_it(data: Data, tmp_path: Path) -> None:
    report = check(data)
    html = page(report)
    assert "<svg" in html and "mine" in html and "no answer" in html
    assert "http" not in html and "<script" not in html and "<link" not in html
    report["sft"] = {"<b>": report["sft"]["mine"]}
    assert "<b>" not in page(report)


def test_lengths_and_cuts_by_the_tokenizer(data: Data) -> None:
    from glm.data.encode import encode_row
    from glm.models import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "tests" / "golden" / "tokenizer-chatglm2-tiny")
    short = data.model_copy(update={"max_source_length": 40, "max_target_length": 8})
    counter = TokenizerCounter(short, tokenizer, "tiny")
    counts = check(short, counter=counter)["sft"]["mine"]
    assert counts["tokens"]["counted_by"] == "tiny"
    rows = [[("user", f"问题 {i}"), ("assistant", f"回答 {i}")] for i in range(60)]
    rows.append([("user", "<script>alert(1)</script>" + "长" * 900), ("assistant", "短")])
    messages = [[{"role": role, "content": content} for role, content in row] for row in rows]
    expected = sum(encode_row(tokenizer, {"messages": row}, short)["truncated"] for row in messages)
    assert expected > 0
    assert counts["truncated"] == expected


def test_the_command(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(f"data: {{dataset_dir: {data.dataset_dir}}}\n")
    assert main(["mine", "--params", str(params), "--out", str(tmp_path / "out")]) == 1
    assert "sft mine: read 65, kept 61" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    assert main(["mien", "--params", str(params)]) == 2
    assert "did you mean mine?" in capsys.readouterr().err


def test_nothing_kept_is_a_failure(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(f"data: {{dataset_dir: {data.dataset_dir}}}\n")
    Path(data.dataset_dir, "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert main(["mine", "--params", str(params)]) == 1
    assert "line 1: no question: no column 'instruction'" in capsys.readouterr().out


def test_the_longest_rows_are_kept_ones_and_reasons_are_not_without_number(data: Data) -> None:
    rows = [{"instruction": "q" * at, "output": "a"} for at in range(1, 200)]
    rows += [{f"column {at}": ""} for at in range(100)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(data.dataset_dir, "rows.jsonl").write_text(text)
    counts = check(data.model_copy(update={"max_samples": 20}))["sft"]["mine"]
    assert counts["longest"][0]["tokens"] == counts["tokens"]["max"]
    assert len(counts["dropped"]) <= 32 and counts["dropped"]["other reasons"] == 70
    assert counts["read"] == 299 == counts["kept"] + sum(counts["dropped"].values())


def test_the_command_starts_without_torch() -> None:
    code = "import sys, glm.data.check; assert not {'torch', 'transformers', 'datasets', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
