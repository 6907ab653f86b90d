"""Policies whose answers come from a server over HTTP: this project's own one, by the protocol of vLLM's."""

import importlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from glm.config import Sft
from glm.errors import InputError
from glm.generation.remote_rollout import RemoteRollout, split_gate_up
from glm.generation.rollout import Decoder
from glm.models.adapters import add_lora, load_lora, save_lora
from glm.serving.engine import Engine
from glm.training.actors import Actors
from glm.training.checkpoint import Checkpoints
from tests.code.running_server import KEY, Running
from tests.model import test_rivals
from tests.model.test_ppo import PARAMS, TOKENIZER, make_actors, make_base, prompts, same, state_of, train


def serve(folder: Path, base=None, port: int = 0) -> Running:
    """A server of the base of test_ppo that takes adapters from `folder`."""
    return Running("", folder / "feedback", Engine(base or make_base(), TOKENIZER), lora_folder=folder, port=port)


@pytest.fixture
def server(tmp_path: Path):
    with serve(tmp_path) as running:
        yield running


def connect(server: Running, folder: Path) -> RemoteRollout:
    return RemoteRollout(server.url, folder / "rollout", KEY)


def greedy(rollout: RemoteRollout, actors: Actors, asked: list[list[int]]) -> list[list[int]]:
    return rollout.sample(actors.model, "policy", asked, TOKENIZER, max_new_tokens=12, temperature=0.0)[0]


def test_the_server_answers_with_the_policy_as_it_is_now(server: Running, tmp_path: Path) -> None:
    asked = prompts(20)
    with connect(server, tmp_path) as rollout:
        actors = make_actors(tmp_path, rollout=rollout)
        seen = []
        for scale in (1.0, 8.0, -8.0):
            with torch.no_grad():
                for name, parameter in actors.policy.items():
                    if ".lora_B." in name:
                        parameter.mul_(scale)
            wanted = Decoder(actors.model).sample(asked, TOKENIZER, max_new_tokens=12, batch_size=20).answers
            assert greedy(rollout, actors, asked) == wanted
            seen.append(wanted)
            assert server.engine.lora_names() == [rollout.loaded]
            assert [path.name for path in rollout.folder.iterdir()] == [rollout.loaded]
        assert seen[0] != seen[1] != seen[2] != seen[0]
    assert server.engine.lora_names() == [] and not rollout.folder.exists()


def test_ppo_with_answers_from_the_server_logs_the_same(server: Running, tmp_path: Path) -> None:
    params = PARAMS.model_copy(update={"max_steps": 1, "ppo_epochs": 1})
    _, own = train(make_actors(tmp_path), params)
    with connect(server, tmp_path) as rollout:
        numbers, curves = train(make_actors(tmp_path, rollout=rollout), params)
    assert [values.keys() for _, values in curves] == [values.keys() for _, values in own]
    assert numbers["kl_before"] == pytest.approx(0, abs=1e-4) and curves[1][1]["rollout_gap"] < 1e-5


@pytest.mark.slow
def test_ppo_learns_with_answers_from_the_server(server: Running, tmp_path: Path) -> None:
    with connect(server, tmp_path) as rollout:
        actors = make_actors(tmp_path, rollout=rollout)
        numbers, curves = train(actors, PARAMS.model_copy(update={"max_steps": 25, "eval_steps": 25}))
    rewards = [values["reward"] for step, values in curves if step]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.6 and 0 < numbers["kl"] < 20


@pytest.mark.parametrize("algorithm", [pytest.param("grpo", marks=pytest.mark.slow), "raft"])
def test_others_that_learn_from_their_answers(
    algorithm: str, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(server, tmp_path) as rollout:
        monkeypatch.setattr(test_rivals, "make_actors", lambda folder: make_actors(folder, rollout=rollout))
        _, numbers, curves = test_rivals.train(algorithm, tmp_path, 2)
    assert numbers["steps"] == 2 and rollout.checked and [step for step, _ in curves] == [0, 1, 2]


def test_a_server_that_dies_ends_the_training_which_goes_on_later(tmp_path: Path) -> None:
    few = {"batch_size": 4, "mini_batch_size": 4}
    params = PARAMS.model_copy(update={"max_steps": 4, "save_steps": 2, "eval_steps": 4} | few)

    def run(server: Running, name: str, dies_at: int | None = None) -> tuple:
        def progress(done: int, total: int) -> None:
            if done == dies_at:
                server.uvicorn.should_exit = True
                server.thread.join()

        with connect(server, tmp_path) as rollout:
            actors = make_actors(tmp_path, rollout=rollout)
            torch.manual_seed(11)
            curves: list = []
            numbers = importlib.import_module("glm.training.ppo").train(
                actors,
                TOKENIZER,
                prompts(8),
                prompts(4),
                params,
                seed=5,
                log=lambda step, values: curves.append((step, values)),
                progress=progress,
                checkpoints=Checkpoints(tmp_path / name),
            )
        return state_of(actors), numbers, [step for step, _ in curves]

    with serve(tmp_path) as server:
        unbroken = run(server, "unbroken")
    port = int(server.url.rpartition(":")[2])
    with serve(tmp_path, port=port) as server, pytest.raises(InputError, match=f"rollout.url {server.url}: no answers"):
        run(server, "broken", dies_at=3)
    assert (tmp_path / "broken" / "step-2").exists()
    with serve(tmp_path, port=port) as server:
        again = run(server, "broken")
    assert again[2] == [0, 1, 2, 3, 4]
    assert same(unbroken[0], again[0]) and unbroken[1] == again[1]


def test_a_server_of_another_model_and_no_server_are_told(tmp_path: Path) -> None:
    other = make_base()
    nn.init.normal_(other.lm_head.weight, std=1.0)
    with serve(tmp_path, other) as server, connect(server, tmp_path) as rollout:
        actors = make_actors(tmp_path, rollout=rollout)
        with pytest.raises(InputError, match="serves another model"):
            actors.sample(prompts(8), TOKENIZER, PARAMS)
    with pytest.raises(InputError, match="no OpenAI-compatible server"):
        connect(server, tmp_path)


def make_lora(base, folder: Path, number: int, **shape) -> Path:
    """A random LoRA for `base`, which is as before afterwards."""
    torch.manual_seed(number)
    adapted = add_lora(base, Sft(lora_rank=4, **shape))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    folder.mkdir(parents=True)
    save_lora(adapted, folder, "tiny")
    adapted.unload()
    return folder


def test_adapters_come_and_go_and_each_request_has_its_own(server: Running, tmp_path: Path) -> None:
    def post(path: str, **body) -> httpx.Response:
        return server.http.post(f"/v1/{path}", json=body)

    def answer(model: str, prompt: list[int]) -> list[int]:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
        [choice] = post("completions", **body).json()["choices"]
        return choice["token_ids"]

    asked = prompts(6)
    wanted = {"tiny": Decoder(make_base()).sample(asked, TOKENIZER, max_new_tokens=12, batch_size=6).answers}
    for number, (name, target) in enumerate({"a": ["query_key_value"], "b.2": ["o_proj", "down_proj"]}.items()):
        folder = make_lora(make_base(), tmp_path / name, number, lora_target=target)
        tuned = load_lora(make_base(), folder).eval()
        wanted[name] = Decoder(tuned).sample(asked, TOKENIZER, max_new_tokens=12, batch_size=6).answers
        assert answer("tiny", asked[0]) == wanted["tiny"][0]
        told = post("load_lora_adapter", lora_name=name, lora_path=str(folder))
        assert (told.status_code, told.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    assert wanted["a"] != wanted["b.2"] != wanted["tiny"] != wanted["a"]
    cards = server.http.get("/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [("tiny", None), ("a", "tiny"), ("b.2", "tiny")]

    questions = [(name, place) for place in range(6) for name in wanted]
    with ThreadPoolExecutor(len(questions)) as pool:
        found = list(pool.map(lambda question: answer(question[0], asked[question[1]]), questions))
    assert found == [wanted[name][place] for name, place in questions]

    assert post("load_lora_adapter", lora_name="a", lora_path=str(tmp_path / "a")).status_code == 400
    assert post("unload_lora_adapter", lora_name="c").status_code == 404
    assert post("unload_lora_adapter", lora_name="a").text == "Success: LoRA adapter 'a' removed successfully."
    assert post("completions", model="a", prompt=asked[0]).status_code == 404
    assert answer("tiny", asked[1]) == wanted["tiny"][1] and answer("b.2", asked[1]) == wanted["b.2"][1]


def test_nothing_but_fitting_loras_below_the_folder_is_loaded(server: Running, tmp_path: Path) -> None:
    def load(path: Path | str, name: str = "x") -> httpx.Response:
        return server.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

    good = make_lora(make_base(), tmp_path / "good", 0)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    shutil.copytree(good, outside)
    (tmp_path / "link").symlink_to(outside)
    for path in (outside, tmp_path / ".." / outside.name, tmp_path / "link", "/etc", "good"):
        told = load(path)
        assert told.status_code == 400 and "not below the folder" in told.text, path
    assert "adapter_config.json" in load(tmp_path / "nothing").text
    wrong = make_lora(make_base(), tmp_path / "wrong", 1)
    config = json.loads((wrong / "adapter_config.json").read_text())
    for change in ({"r": 8}, {"target_modules": ["nonsense"]}, {"r": "x"}, {"peft_type": "IA3"}, {"use_dora": True}):
        (wrong / "adapter_config.json").write_text(json.dumps(config | change))
        assert load(wrong).status_code == 400, change
    assert load(good).status_code == 200
    shutil.rmtree(outside)


def test_adapters_are_not_loaded_unless_the_server_was_started_so(tmp_path: Path) -> None:
    with Running("", tmp_path, Engine(make_base(), TOKENIZER)) as server:
        for path in ("load_lora_adapter", "unload_lora_adapter"):
            assert server.http.post(f"/v1/{path}", json={"lora_name": "x", "lora_path": "y"}).status_code == 404


def test_a_lora_of_gate_and_up_together_becomes_two(tmp_path: Path) -> None:
    folder = make_lora(make_base(), tmp_path / "fused", 0, lora_target="all-linear")
    fused = load_file(folder / "adapter_model.safetensors")
    split_gate_up(folder)
    split = load_file(folder / "adapter_model.safetensors")
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    leaves = {name.rpartition(".")[2] for name in targets}
    assert leaves == {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}
    for layer in range(2):
        place = f"base_model.model.model.layers.{layer}"
        both, gate, up = (
            split_or_fused[f"{place}.mlp.{name}.lora_B.weight"] @ split_or_fused[f"{place}.mlp.{name}.lora_A.weight"]
            for split_or_fused, name in ((fused, "gate_up_proj"), (split, "gate_proj"), (split, "up_proj"))
        )
        torch.testing.assert_close(torch.cat([gate, up]), both)
        name = f"{place}.self_attn.q_proj.lora_A.weight"
        assert torch.equal(split[name], fused[name])
    assert not any("gate_up_proj" in name for name in split)
