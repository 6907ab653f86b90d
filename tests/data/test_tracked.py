"""Local sources under DVC: pushed and pulled, and told apart when missing and when altered."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.repo import Repo

from glm.errors import InputError
from tasks.inputs import check_tracked
from tasks.lineage import stage_entry

ROOT = Path(__file__).parents[2]
ROWS = '[{"instruction": "q", "output": "a"}]'


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repo]:
    """A DVC repository with a local remote, a tracked file and a tracked folder, all pushed."""
    (tmp_path / "work" / "data" / "parts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    with Repo.init(no_scm=True) as made:
        with made.config.edit() as config:
            config["core"].update(remote="store", analytics=False, check_update=False)
            config["remote"] = {"store": {"url": str(tmp_path / "store")}}
        Path("data/rows.json").write_text(ROWS)
        Path("data/parts/a.json").write_text(ROWS)
        made.add(["data/rows.json", "data/parts"])
        made.push()
        yield made


def lose(*paths: str) -> None:
    """Remove paths and DVC's cache: what a fresh clone does not have."""
    for path in (*paths, ".dvc/cache"):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def test_push_and_pull(repo: Repo) -> None:
    lose("data/rows.json", "data/parts")
    with pytest.raises(InputError, match=r"rows\.json is tracked by DVC but not here: `dvc pull data/rows\.json\.dvc`"):
        check_tracked("mine", Path("data"), "rows.json")
    with pytest.raises(InputError, match=r"data/parts is tracked by DVC but not here: `dvc pull data/parts\.dvc`"):
        check_tracked("mine", Path("data"), "parts/a.json")
    with Repo() as fresh:  # the old object remembers the folders of its cache
        fresh.pull(["data/rows.json.dvc", "data/parts.dvc"])
    for file_name in ("rows.json", "parts", "parts/a.json"):
        check_tracked("mine", Path("data"), file_name)


def test_an_altered_file_is_not_a_missing_one(repo: Repo) -> None:
    for path in (Path("data/rows.json"), Path("data/parts/a.json")):
        path.unlink()  # it may be a link into DVC's cache
        path.write_text(ROWS.replace("q", "p"))
    with pytest.raises(InputError, match=r"altered.*`dvc checkout --force data/rows\.json\.dvc`.*`dvc add data/rows"):
        check_tracked("mine", Path("data"), "rows.json")
    with pytest.raises(InputError, match=r"altered.*`dvc checkout --force data/parts\.dvc`.*`dvc add data/parts`"):
        check_tracked("mine", Path("data"), "parts")
    repo.checkout(["data/rows.json.dvc"], force=True)
    check_tracked("mine", Path("data"), "rows.json")
    assert Path("data/rows.json").read_text() == ROWS
    repo.add(["data/parts"])
    check_tracked("mine", Path("data"), "parts")


def test_what_is_not_tracked_is_left_alone(repo: Repo) -> None:
    Path("data/other.json").write_text(ROWS)
    check_tracked("mine", Path("data"), "other.json")
    check_tracked("mine", Path("data"), "nowhere.json")


def test_what_did_not_change_is_not_read_again(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    for file_name in ("rows.json", "parts"):
        check_tracked("mine", Path("data"), file_name)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.inputs.content_hash", None)
        for file_name in ("rows.json", "parts/a.json"):
            check_tracked("mine", Path("data"), file_name)
    altered = Path("data/parts/a.json")
    altered.chmod(0o644)
    altered.write_text(ROWS.replace("q", "p"))  # of the same size
    with pytest.raises(InputError, match="data/parts was altered"):
        check_tracked("mine", Path("data"), "parts/a.json")


def test_the_folder_of_params_yaml_is_what_fetch_depends_on(tmp_path: Path) -> None:
    """Wherever it is: an edited file there must not be taken for the old one."""
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "params.yaml").write_text("data: {dataset_dir: ../elsewhere}\n")
    assert "../elsewhere" in stage_entry("fetch", "ppo", tmp_path / "dvc.yaml").deps
    assert "data" in stage_entry("fetch", "ppo", ROOT / "dvc.yaml").deps
