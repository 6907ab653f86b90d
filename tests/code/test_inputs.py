"""What params.yaml names is looked for before a run starts."""

import json
from pathlib import Path

import pytest

from glm.config import validate_params
from glm.errors import InputError
from tasks.inputs import check_inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_embedded_default_has_all_it_needs() -> None:
    check_inputs(validate_params({}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"sft": ["alpaca_zhh"]}}, "dataset 'alpaca_zhh' is not in"),
        ({"data": {"dataset_dir": "nowhere"}}, "dataset_info.json: no such file"),
        ({"data": {"text": []}}, "data.text: empty"),
        ({"model": {"path": "tests"}}, "tests has no config.json"),
        ({"model": {"path": "./no/such/folder"}}, "neither 'embedded', nor a folder, nor a hub id"),
    ],
)
def test_what_is_missing_is_named(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_inputs(validate_params(values))


def test_a_local_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json"}}), encoding="utf-8")
    data = {"dataset_dir": str(tmp_path), "text": ["mine"], "sft": ["mine"], "reward": ["mine"], "ppo": ["mine"]}
    with pytest.raises(InputError, match=r"mine\.json does not exist"):
        check_inputs(validate_params({"data": data}))


def test_a_hub_id_is_not_asked_for() -> None:
    check_inputs(validate_params({"model": {"path": "zai-org/chatglm2-6b"}}))
