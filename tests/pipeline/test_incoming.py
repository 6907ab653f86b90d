"""What a retraining brings in by itself: a new commit of the hub, a new state of a `dvc import`ed source."""

import json
import shutil
from pathlib import Path

import pytest
from dvc.api import DVCFileSystem

from tests.pipeline.conftest import HERE, ROOT, Project
from tests.pipeline.hub import Hub, served
from tests.pipeline.test_retrain import PAIR, retrain

pytestmark = pytest.mark.slow


def rows(*answers: str) -> bytes:
    return b"".join(json.dumps(PAIR | {"chosen": answer}).encode() + b"\n" for answer in answers)


@pytest.fixture
def fetching(project: Project) -> Project:
    """A project with trivial stages but for the real fetch, and a trivial judge."""
    shutil.copy(HERE / "trivial_judge.py", project.root / "tasks" / "judge.py")
    shutil.copy(ROOT / "tasks" / "fetch.py", project.root / "tasks" / "fetch.py")
    return project


def register(project: Project, entry: dict[str, object]) -> None:
    """Register the dataset `answers` and learn from it."""
    path = project.root / "data" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"answers": entry}, ensure_ascii=False, indent=2))
    project.set_param("data.reward", "[reviews_pairs]", "[reviews_pairs, answers]")
    project.commit()


def fetched(project: Project) -> tuple[dict[str, str], bytes]:
    """Entry and content of the dataset in the newest run, out of its DVC experiment."""
    newest = project.git("for-each-ref", "refs/exps", "--sort=-creatordate", "--format=%(objectname)").split()[0]
    files = DVCFileSystem(str(project.root), rev=newest)
    entry = json.loads(files.read_text("prepared/raw/sources.json"))["answers"]["entry"]
    return entry, b"".join(map(files.read_bytes, sorted(files.find("prepared/raw/answers"))))


def test_the_hubs_newest_commit(fetching: Project) -> None:
    project, hub = fetching, Hub("li/answers")
    first = hub.commit({"rows.jsonl": rows("很好")})
    register(project, {"hf_hub_url": "li/answers", "files": ["rows.jsonl"]})
    with served(hub) as address:
        project.env |= {"HF_ENDPOINT": address}
        assert retrain(project).startswith("Promoted")
        entry, content = fetched(project)
        assert entry["revision"] == first and content == rows("很好")
        assert retrain(project).startswith("No new data")

        second = hub.commit({"rows.jsonl": rows("很好", "不错")})
        assert retrain(project).startswith("Promoted")
        entry, content = fetched(project)
        assert entry["revision"] == second and content == rows("很好", "不错")
    assert retrain(project).startswith("No new data")  # the hub is away: as last time
    assert project.git("status", "--porcelain") == ""


def test_an_imported_source(fetching: Project, tmp_path: Path) -> None:
    project = fetching
    source = Project(tmp_path / "source", Path(project.env["HOME"]), None)
    source.root.mkdir()
    source.git("init", "--quiet")
    source.dvc("init", "--quiet")
    (source.root / "rows.jsonl").write_bytes(rows("很好"))
    source.dvc("add", "rows.jsonl")
    source.commit()
    project.dvc("import", str(source.root), "rows.jsonl", "--out", "data/answers.jsonl")
    register(project, {"file_name": "answers.jsonl"})

    assert retrain(project).startswith("Promoted")
    assert fetched(project)[1] == rows("很好")
    assert retrain(project).startswith("No new data")

    (source.root / "rows.jsonl").write_bytes(rows("很好", "不错"))
    source.dvc("add", "rows.jsonl")
    source.commit()
    assert retrain(project).startswith("Promoted")
    assert fetched(project)[1] == rows("很好", "不错")
    assert retrain(project).startswith("No new data")

    # gone: the run says so, and nobody loses the file
    source.root.rename(tmp_path / "moved")
    done = project.command("python", "-m", "flows.retrain", check=False)
    assert done.returncode == 1 and str(source.root) in done.stderr and "Traceback" not in done.stderr
    assert (project.root / "data" / "answers.jsonl").exists()
    assert project.git("status", "--porcelain") == ""
