"""A reader sees the old file or the new one, never half of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glm.files import read_jsonl, replace_folder, write_json, write_jsonl

ROOT = Path(__file__).parents[2]


def test_round_trip(tmp_path: Path) -> None:
    rows = [{"text": "你好\n世界"}, {"text": "\u2028 and \x85 end no line"}]
    write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "deep" / "rows.jsonl") == rows


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [0.1]})
    write_json(tmp_path / "b.json", {"a": [0.1], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": True})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(tmp_path / "a.json", {"new": "\ud800"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_is_removed_and_who_is_at_work_is_not_disturbed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom glm.files import replace_folder\n"
        "with replace_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('1')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "out"], cwd=ROOT)
    [left] = tmp_path.iterdir()
    (tmp_path / ".out.settings").mkdir()  # of somebody else
    with replace_folder(tmp_path / "out") as first:
        assert not left.exists()
        with replace_folder(tmp_path / "out") as second:
            (second / "second").touch()
        (first / "first").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.settings"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with replace_folder(target) as folder:
        (folder / "first").write_text("1")
    with pytest.raises(RuntimeError), replace_folder(target) as folder:
        (folder / "second").write_text("2")
        raise RuntimeError("in the middle")
    assert [path.name for path in target.iterdir()] == ["first"]
    with replace_folder(target) as folder:
        (folder / "third").write_text("3")
    assert [path.name for path in target.iterdir()] == ["third"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
