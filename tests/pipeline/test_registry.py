"""Logged and registered models: real sqlite stores, a tiny model with a real tokenizer, loaded in other processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from flows import champion, promotion, registry
from flows.errors import HubError, SmokeTestError
from flows.gate import Decision
from flows.registry import alias_version, moved_alias, register, smoke_test
from flows.retrain import last_retraining
from glm.config import Params, validate_params
from glm.errors import InputError
from tasks.judge import open_champion
from tasks.lineage import content_hash
from tasks.logged_models import ANSWER, EXAMPLE, log_chat_model, log_reward_model
from tasks.tracking import open_store
from tests.model.hub_server import TOKEN, hub

ROOT = Path(__file__).parent.parent.parent
NAME = "rlhf-policy"
TEXTS = [
    f"{place}的{thing}很{quality}，写一段评论。"
    for place in "酒店书电脑"
    for thing in "房间服务屏幕"
    for quality in "好坏快慢"
]
ASK = """
import json, sys, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
question = json.loads(sys.argv[2])
print(json.dumps(model.predict(question, params={"max_new_tokens": 8})))
import glm
print(glm.__file__)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random weights: `base`, a LoRA `adapter`, a `reward` model, and `export`: base and LoRA merged."""
    from peft import LoraConfig, get_peft_model

    from glm.config import EmbeddedModel
    from glm.models.embedded import new_model, train_tokenizer
    from glm.models.lineage import Lineage
    from glm.models.saving import save_trained

    folder = tmp_path_factory.mktemp("models")
    (folder / "base").mkdir()
    tokenizer = train_tokenizer(TEXTS * 20, 400, folder / "base")
    torch.manual_seed(0)
    model = new_model(EmbeddedModel(hidden_size=32, num_layers=2, ffn_hidden_size=64), tokenizer)
    model.save_pretrained(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(str(folder / "adapter"))
    (folder / "reward").mkdir()
    head = torch.nn.Linear(32, 1, bias=False)
    save_trained(tuned, "lora", folder / "reward", Lineage(base=str(folder / "base")), score=head)
    tuned.merge_and_unload().save_pretrained(folder / "export")
    tokenizer.save_pretrained(folder / "export")
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without experiments: making the tables takes longer than most tests."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    shutil.copy(tables, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return open_store("rlhf-pipeline")[0]


def outside() -> dict[str, str]:
    """The environment of a process that does not know this checkout."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def ask(model_uri: str, question: dict[str, object], elsewhere: Path) -> tuple[list[dict[str, str]], str]:
    """The answer of a model loaded in a new process outside this checkout, and the `glm` it was loaded with."""
    command = [sys.executable, "-c", ASK, model_uri, json.dumps(question)]
    result = subprocess.run(command, cwd=elsewhere, env=outside(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer, package = result.stdout.splitlines()[-2:]
    return json.loads(answer), package


def expected_answer(folder: Path, new_tokens: int) -> str:
    """The greedy answer by plain transformers."""
    from transformers import GlmForCausalLM

    from glm.models import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.apply_chat_template(EXAMPLE["messages"], add_generation_prompt=True, return_dict=False)
    output = GlmForCausalLM.from_pretrained(folder).generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=new_tokens, eos_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


def test_a_logged_adapter_answers_from_the_artifact_alone(store: MlflowClient, models: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(models, workspace)
    with mlflow.start_run(experiment_id=store.get_experiment_by_name("rlhf-pipeline").experiment_id) as run:
        info = log_chat_model("sft-adapter", Params().data, workspace / "base", workspace / "adapter")
    shutil.rmtree(workspace)
    (output,) = store.get_run(run.info.run_id).outputs.model_outputs
    assert output.model_id == info.model_id

    (answer,), package = ask(info.model_uri, EXAMPLE, tmp_path)
    assert answer == {"role": "assistant", "content": expected_answer(models / "export", 8)}
    assert answer["content"] != expected_answer(models / "base", 8)
    assert str(ROOT) not in package

    signature = info.signature.to_dict()
    assert json.loads(signature["inputs"])[0]["name"] == "messages"
    assert {entry["name"] for entry in json.loads(signature["params"])} >= {
        "max_new_tokens",
        "do_sample",
        "temperature",
    }
    model = mlflow.models.get_model_info(info.model_uri)
    assert model.saved_input_example_info is not None
    requirements = Path(mlflow.artifacts.download_artifacts(info.model_uri), "requirements.txt").read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}\n" in requirements


def test_a_base_elsewhere_is_followed_and_the_system_prompt_is_kept(
    store: MlflowClient, models: Path, tmp_path: Path
) -> None:
    pointer = tmp_path / "base"
    pointer.mkdir()
    (pointer / "source.json").write_text(json.dumps({"path": str(models / "base"), "revision": None}))
    answers = []
    for prefix in ("", "写评论"):
        with mlflow.start_run(experiment_id=store.get_experiment_by_name("rlhf-pipeline").experiment_id):
            data = validate_params({"data": {"source_prefix": prefix}}).data
            info = log_chat_model("sft-adapter", data, pointer, models / "adapter")
        model = mlflow.pyfunc.load_model(info.model_uri)
        answers.append(model.predict(EXAMPLE, params={"max_new_tokens": 8})[0]["content"])
        assert len(model.predict([EXAMPLE, EXAMPLE], params={"max_new_tokens": 4})) == 2
        sampled = [
            model.predict(EXAMPLE, params={"max_new_tokens": 8, "do_sample": True, "seed": seed})[0]["content"]
            for seed in (1, 1, 2)
        ]
        assert sampled[0] == sampled[1] != sampled[2]
    assert answers[0] == expected_answer(models / "export", 8) != answers[1]


def test_a_logged_reward_model_scores_the_last_answer(store: MlflowClient, models: Path, tmp_path: Path) -> None:
    with mlflow.start_run(experiment_id=store.get_experiment_by_name("rlhf-pipeline").experiment_id):
        info = log_reward_model("reward", Params().data, models / "base", models / "reward")
    judge = mlflow.pyfunc.load_model(info.model_uri)
    dialogues = [{"messages": [*EXAMPLE["messages"], ANSWER | {"content": text}]} for text in ("很好", "很坏很慢")]
    together = judge.predict(dialogues)
    assert together == pytest.approx([judge.predict(dialogue)[0] for dialogue in dialogues], abs=1e-5)
    assert abs(together[0] - together[1]) > 1e-4
    assert info.signature.to_dict()["inputs"] is not None


def test_an_export_is_registered_once_and_becomes_the_challenger(
    store: MlflowClient, models: Path, tmp_path: Path
) -> None:
    params = Params()
    with mlflow.start_run(experiment_id=store.get_experiment_by_name("rlhf-pipeline").experiment_id) as run:
        digest = content_hash(models / "export")
        logged = log_chat_model("export", params.data, models / "export", tags={"dvc_md5": digest})
    first = register(models / "export", run.info.run_id, params)
    version = store.get_model_version(NAME, first)
    assert version.source == f"models:/{logged.model_id}"  # the run's own logged model, not a second copy
    assert version.tags == {"dvc_md5": digest, "glmflow.run.export": run.info.run_id, "smoke_test": "passed"}
    assert alias_version(store, NAME, "challenger") == first

    started = time.monotonic()
    assert register(models / "export", run.info.run_id, params) == first
    assert time.monotonic() - started < 3  # not even the smoke test
    assert len(store.search_model_versions(f"name = '{NAME}'")) == 1
    assert len(store.search_logged_models([run.info.experiment_id])) == 1

    other = tmp_path / "export"
    shutil.copytree(models / "export", other)
    (other / "README.md").write_text("another export")
    second = register(other, "0" * 32, params)  # a run that this store does not know: the folder is logged now
    assert second != first
    assert alias_version(store, NAME, "challenger") == second


def test_a_model_that_does_not_answer_is_no_challenger(store: MlflowClient, models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models / "export", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 64, "head_dim": 16}))
    with pytest.raises(SmokeTestError, match=f"models:/{NAME}/1"):
        register(broken, None, Params())
    assert alias_version(store, NAME, "challenger") is None
    assert "smoke_test" not in store.get_model_version(NAME, "1").tags


def test_the_alias_moves_after_the_model_has_answered(
    store: MlflowClient, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed while the model is asked leaves the alias where it was."""
    seen = []
    monkeypatch.setattr(registry, "smoke_test", lambda uri: seen.append(alias_version(store, NAME, "challenger")))
    register(models / "export", None, Params())
    assert seen == [None] and alias_version(store, NAME, "challenger") == "1"


def test_the_champion_is_opened_by_what_is_left_of_it(
    store: MlflowClient, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = store.get_experiment_by_name("rlhf-pipeline").experiment_id
    run = store.create_run(experiment)
    store.log_param(run.info.run_id, "data.test_ratio", 0.3)
    with mlflow.start_run(experiment_id=experiment):
        logged = log_chat_model("export", Params().data, models / "export")
    store.create_registered_model(NAME)
    for source in (f"models:/{logged.model_id}", "/nowhere/1"):
        store.create_model_version(NAME, source=source, tags={"glmflow.run.pipeline": run.info.run_id})
    contender, splits = open_champion(f"models:/{NAME}/1", Params())
    assert (contender.folder / "config.json").exists() and splits.test_ratio == 0.3

    store.delete_run(run.info.run_id)
    SqlAlchemyStore(mlflow.get_tracking_uri(), "unused")._hard_delete_run(run.info.run_id)  # `mlflow gc`
    assert open_champion(f"models:/{NAME}/1", Params())[1] == Params().data
    assert "its run is gone" in capsys.readouterr().err

    with pytest.raises(InputError, match=f"models:/{NAME}/2: the champion's files cannot be had.*rollback"):
        open_champion(f"models:/{NAME}/2", Params())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "MLmodel").write_text("flavors: {sklearn: {}}")
    store.create_model_version(NAME, source=str(tmp_path / "other"))
    with pytest.raises(InputError, match=f"models:/{NAME}/3: the champion was not logged by this project"):
        open_champion(f"models:/{NAME}/3", Params())


def test_a_failed_transaction_puts_the_alias_back(store: MlflowClient) -> None:
    store.create_registered_model(NAME)
    model = store.create_logged_model(store.get_experiment_by_name("rlhf-pipeline").experiment_id)
    for version in ("1", "2"):
        store.create_model_version(NAME, source=model.model_uri)
        with moved_alias(store, NAME, "challenger", version):
            assert alias_version(store, NAME, "challenger") == version
    with pytest.raises(KeyboardInterrupt), moved_alias(store, NAME, "challenger", "1"):
        assert alias_version(store, NAME, "challenger") == "1"
        raise KeyboardInterrupt
    assert alias_version(store, NAME, "challenger") == "2"


@pytest.fixture
def versions(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Four versions that answer, so that only the alias and its record are under test."""
    store.create_registered_model(NAME)
    experiment = store.get_experiment_by_name("rlhf-pipeline").experiment_id
    for number in range(1, 5):
        run = store.create_run(experiment, tags={"glmflow.step": "pipeline"})
        tags = {"glmflow.run.pipeline": run.info.run_id}
        store.create_model_version(NAME, source=f"/nowhere/{number}", tags=tags)
    monkeypatch.setattr(champion, "smoke_test", lambda uri: None)
    return store


def test_champions_are_promoted_and_taken_back_step_by_step(versions: MlflowClient) -> None:
    params = Params()
    assert champion.promote("1", "the first", params) == ("1", None)
    assert champion.promote("2", "better", params, by="gate") == ("2", "1")
    assert champion.promote("2", "again", params) == ("2", "2")  # nothing to do, nothing recorded
    run_id = versions.get_model_version(NAME, "3").tags["glmflow.run.pipeline"]
    assert champion.promote_run(run_id, "the run's", params) == ("3", "2")
    assert versions.get_model_version(NAME, "3").tags["promoted.reason"] == "the run's"

    assert champion.rollback("it swears", params) == ("2", "3")
    assert champion.rollback("so does this one", params) == ("1", "2")
    assert alias_version(versions, NAME, "champion") == "1"
    with pytest.raises(InputError, match="cannot go 1 back from version 1: champions before it are none"):
        champion.rollback("further", params)

    champion.promote("4", "new", params)
    versions.set_registered_model_alias(NAME, "champion", "2")  # by other means
    champion.promote("3", "newer", params)
    assert champion.rollback("three", params, steps=3) == ("1", "3")
    moves = [(move.action, move.version, move.before, move.reason) for move in champion.moves(params)]
    assert moves == [
        ("promote", "1", None, "the first"),
        ("promote", "2", "1", "better"),
        ("promote", "3", "2", "the run's"),
        ("rollback", "2", "3", "it swears"),
        ("rollback", "1", "2", "so does this one"),
        ("promote", "4", "1", "new"),
        ("promote", "3", "2", "newer"),
        ("rollback", "1", "3", "three"),
    ]
    assert champion.moves(params)[1].by == "gate"


def test_of_two_who_move_the_alias_at_once_the_second_is_told(
    versions: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion.promote("1", "the first", Params())
    champion.promote("2", "better", Params())
    told = "meanwhile the champion has become version {} \\(it was {}\\)"
    for before, mine, theirs in (("2", "3", "3"), ("3", "4", "1"), ("1", "", "2")):

        def somebody_is_quicker(uri: str, theirs: str = theirs) -> None:
            monkeypatch.setattr(champion, "smoke_test", lambda uri: None)
            champion.promote(theirs, "theirs", Params())

        monkeypatch.setattr(champion, "smoke_test", somebody_is_quicker)
        with pytest.raises(InputError, match=told.format(theirs, before)):
            champion.promote(mine, "mine", Params()) if mine else champion.rollback("mine", Params())
        assert alias_version(versions, NAME, "champion") == theirs
    assert [one.reason for one in champion.moves(Params())] == ["the first", "better", "theirs", "theirs", "theirs"]


def test_deleted_champions_are_passed_over(versions: MlflowClient) -> None:
    for version in ("1", "2", "3"):
        champion.promote(version, "better", Params())
    versions.delete_model_version(NAME, "2")
    assert champion.rollback("worse", Params()) == ("1", "3")


def test_a_move_that_cannot_be_recorded_does_not_happen(
    versions: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion.promote("1", "the first", Params())
    champion.promote("2", "better", Params())

    def full_disk(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(MlflowClient, "set_registered_model_tag", full_disk)
    for move in (lambda: champion.promote("3", "better", Params()), lambda: champion.rollback("worse", Params())):
        with pytest.raises(OSError, match="No space"):
            move()
        assert alias_version(versions, NAME, "champion") == "2"


def test_a_move_that_a_kill_cut_off_is_found_again(versions: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    champion.promote("1", "the first", Params())
    time.sleep(1.1)  # moves are recorded by the second

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MlflowClient, "set_registered_model_tag", killed)  # after the alias, before the event
        stays = lambda client, *where: nullcontext(client.set_registered_model_alias(*where))  # noqa: E731
        patched.setattr(champion, "moved_alias", stays)
        champion.promote("2", "better", Params(), by="gate")
    assert alias_version(versions, NAME, "champion") == "2"
    assert [(move.version, move.before, move.reason, move.by) for move in champion.moves(Params())][1:] == [
        ("2", "1", "better", "gate")
    ]
    champion.promote("3", "best", Params())
    assert champion.rollback("rude", Params()) == ("2", "3")
    assert [move.version for move in champion.moves(Params())] == ["1", "2", "3", "2"]


def test_a_decision_that_was_not_carried_out_is_none(
    versions: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill, or a model that does not answer: the next retraining must not take the gate's word for the deed."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "reports" / "judge").mkdir(parents=True)
    monkeypatch.setattr(promotion, "ROOT", tmp_path)
    monkeypatch.setattr(promotion, "judge", lambda root, champion: None)
    monkeypatch.setattr(promotion, "gate", lambda root, version, champion: Decision([]))
    run_id = versions.get_model_version(NAME, "1").tags["glmflow.run.pipeline"]
    versions.set_terminated(run_id)

    def no_answer(uri: str) -> None:
        raise SmokeTestError(uri)

    with monkeypatch.context() as patched, pytest.raises(SmokeTestError):
        patched.setattr(champion, "smoke_test", no_answer)
        promotion.gate_version(tmp_path, "1", run_id)
    assert last_retraining(Params()) is None
    assert promotion.gate_version(tmp_path, "1", run_id).name == "Promoted"
    assert last_retraining(Params()).data.tags["glmflow.gate"] == "passed"
    promotion.decided(Params(), "1", "refused", "Li: rude")  # a person's later word
    promotion.tell_run(Params(), "1")
    assert last_retraining(Params()).data.tags["glmflow.gate"] == "refused"


def test_the_champion_is_not_refused_for_being_it(versions: MlflowClient) -> None:
    """By hand, or by a second run at the same time, while this one waited."""
    champion.promote("1", "the first", Params())
    champion.promote("2", "could not wait", Params())
    assert promotion.promoted(Params(), "2", "1", "approved", by="Li").name == "Unchanged"
    assert versions.get_model_version(NAME, "2").tags["gate.decision"] == "passed"
    refused = promotion.promoted(Params(), "3", "1", "approved", by="Li")
    assert refused.name == "Refused" and "the champion is version 2 now, the comparison was with 1" in refused.message


def test_a_model_that_does_not_answer_is_no_champion(versions: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    champion.promote("1", "the first", Params())
    monkeypatch.setattr(champion, "smoke_test", smoke_test)
    with pytest.raises(SmokeTestError, match=f"models:/{NAME}/2"):
        champion.promote("2", "better", Params())
    assert alias_version(versions, NAME, "champion") == "1"
    assert len(champion.moves(Params())) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda params: champion.promote("1", "  ", params), "reason"),
        (lambda params: champion.promote("7", "better", params), r"models:/rlhf-policy/7: not registered.*4, 3, 2, 1"),
        (lambda params: champion.promote("best", "better", params), "rlhf-policy@best: not registered"),
        (lambda params: champion.promote_run("0" * 32, "better", params), "not in the store"),
        (lambda params: champion.rollback("worse", params), "cannot go 1 back from version none"),
    ],
)
def test_wrong_moves_are_refused(versions: MlflowClient, call: Callable[[Params], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(Params())
    assert alias_version(versions, NAME, "champion") is None


def test_what_becomes_the_champion_goes_to_the_hub(
    store: MlflowClient, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = validate_params({"export": {"push_to_hub": "me/reviews"}}, "params")
    store.create_registered_model(NAME)
    with mlflow.start_run(experiment_id=store.get_experiment_by_name("rlhf-pipeline").experiment_id):
        for folders in ([models / "export"], [models / "base", models / "adapter"]):
            logged = log_chat_model("export", params.data, *folders)
            store.create_model_version(NAME, source=f"models:/{logged.model_id}")
    monkeypatch.setattr(champion, "smoke_test", lambda uri: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(InputError, match="the hub does not know you"):
            champion.promote("1", "good", params)
        assert alias_version(store, NAME, "champion") is None and server.messages == []
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        champion.promote("1", "good", Params())  # nothing is to be sent
        assert server.messages == []
        champion.promote("2", "better", params)
        assert server.messages == ["rlhf-policy/2: better"] and server.private == {"me/reviews": True}
        assert "adapter_config.json" in server.files["me/reviews"] and "config.json" not in server.files["me/reviews"]
    with pytest.raises(HubError, match="glmflow export models:/rlhf-policy/1 FOLDER --push-to-hub me/reviews"):
        champion.rollback("rude", params)  # the hub is away: that keeps nobody from going back
    assert alias_version(store, NAME, "champion") == "1"


def test_a_missing_export_is_named(tmp_path: Path, store: MlflowClient) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        register(tmp_path / "nowhere", None, Params())
    with pytest.raises(MlflowException):
        store.get_registered_model(NAME)


def test_the_scoring_server_answers_a_chat_request(store: MlflowClient, models: Path, tmp_path: Path) -> None:
    with mlflow.start_run(experiment_id=store.get_experiment_by_name("rlhf-pipeline").experiment_id):
        info = log_chat_model("export", Params().data, models / "export")
    version = mlflow.register_model(info.model_uri, NAME).version
    store.set_registered_model_alias(NAME, "challenger", version)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@challenger"]
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(
        [*command, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path,
        env=outside() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # MLflow calls uvicorn by name
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps(EXAMPLE | {"max_new_tokens": 8}).encode(),
            headers={"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
                time.sleep(0.5)
        assert answer == [{"role": "assistant", "content": expected_answer(models / "export", 8)}]
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=20)
