"""params.yaml: everything wrong is refused, by name, before anything runs."""

from pathlib import Path

import pytest

from glm.config import Params, load_params, validate_params
from glm.errors import InputError

ROOT = Path(__file__).parents[2]


def test_the_project_s_own_file_is_valid_and_holds_every_knob() -> None:
    params = load_params(ROOT / "params.yaml")
    written = load_yaml(ROOT / "params.yaml")

    def names(values: dict, prefix: str = "") -> set[str]:
        return {
            name
            for key, value in values.items()
            for name in (names(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"})
        }

    # A knob that stands only in the schema would be no dependency in dvc.yaml: changing its default would go unseen.
    assert names(written) == names(params.model_dump())


VLLM = {"engine": "vllm", "url": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ppo": {"learning_rat": 1e-5}}, ["unknown key ppo.learning_rat", "did you mean ppo.learning_rate?"]),
        ({"pppo": {}}, ["unknown key pppo", "did you mean ppo?"]),
        ({"model": {"embedded": {"hidden": 1}}}, ["unknown key model.embedded.hidden", "hidden_size"]),
        ({"sft": {"lora_rank": "eight"}}, ["sft.lora_rank", "integer", "'eight'"]),
        ({"sft": {"lora_rank": 0}}, ["sft.lora_rank", "greater than or equal to 1", "0"]),
        ({"sft": {"method": "lorra"}}, ["sft.method", "'lora'", "'lorra'"]),
        ({"sft": {"num_train_epochs": float("inf")}}, ["sft.num_train_epochs", "finite"]),
        ({"sft": {"method": "x" * 1000}}, ["sft.method", f"{'x' * 99}…"]),
        ({"ppo": {"learning_rate": 1.5}}, ["ppo.learning_rate", "less than 1", "1.5"]),
        ({"ppo": {"batch_size": 10, "mini_batch_size": 4}}, ["ppo", "batch_size 10", "mini_batch_size 4"]),
        ({"sft": {"max_steps": 0}}, ["sft", "max_steps 0"]),
        ({"data": {"dev_ratio": 0.5, "test_ratio": 0.5}}, ["data", "dev_ratio 0.5", "test_ratio 0.5"]),
        ({"data": {"sft": []}}, ["data.sft", "at least 1"]),
        ({"model": {"revision": "abc"}}, ["model", "revision", "embedded"]),
        ({"model": {"embedded": {"num_attention_heads": 3}}}, ["hidden_size 128", "num_attention_heads (3)"]),
        ({"sft": {"num_layer_trainable": 0}}, ["sft", "num_layer_trainable 0", "first"]),
        ({"model": {"quantization": "nf4"}, "sft": {"method": "full"}}, ["sft.method full", "nf4", "p_tuning"]),
        ({"model": {"quantization": "cpm-int4"}, "reward": {"method": "freeze"}}, ["reward.method freeze", "cpm-int4"]),
        ({"model": {"quantization": "int8"}, "sft": {"init_lora_weights": "pissa"}}, ["pissa", "int8", "default"]),
        ({"model": {"quantization": "cpm-int8"}, "sft": {"use_dora": True}}, ["use_dora", "cpm-int8", "nf4"]),
        (
            {"sft": {"method": "p_tuning"}, "reward": {"method": "p_tuning", "resume_lora_training": False}},
            ["reward.resume_lora_training false", "second prefix"],
        ),
        ({"sft": {"method": "p_tuning"}, "ppo": {"method": "full"}}, ["ppo.method full", "SFT's prefix"]),
        (
            {"algorithm": "dpo", "model": {"quantization": "nf4"}, "dpo": {"method": "full"}},
            ["dpo.method full", "nf4", "p_tuning"],
        ),
        (
            {"algorithm": "rrhf", "sft": {"method": "p_tuning"}, "rrhf": {"method": "full"}},
            ["rrhf.method full", "SFT's prefix"],
        ),
        (
            {
                "algorithm": "raft",
                "sft": {"method": "p_tuning"},
                "raft": {"method": "p_tuning", "resume_lora_training": False},
            },
            ["raft.resume_lora_training false", "second prefix"],
        ),
        ({"algorithm": "grpo", "sft": {"method": "freeze"}}, ["algorithm grpo", "sft.method is freeze"]),
        ({"rollout": {"engine": "vllm"}}, ["rollout", "needs a url"]),
        ({"rollout": {"url": "http://a"}}, ["rollout", "engine own has no url", "http://a"]),
        ({"rollout": {"engine": "vllm", "url": "localhost:8000"}}, ["rollout", "http://", "localhost:8000"]),
        (
            {
                "rollout": VLLM,
                "model": {"quantization": "nf4"},
                "ppo": {"method": "p_tuning"},
                "launch": {"num_processes": 2},
                "sft": {"use_dora": True},
            },
            [
                "rollout.engine vllm",
                "ppo.method p_tuning, not lora",
                "quantization nf4",
                "num_processes 2",
                "use_dora True",
            ],
        ),
        ({"rollout": VLLM, "sft": {"method": "p_tuning"}}, ["rollout.engine vllm", "sft.method p_tuning"]),
        ({"ppo": {"kl_coef": 0.0, "kl_target": 6.0}}, ["ppo", "kl_coef 0", "kl_target 6"]),
        ({"ppo": {"kl_target": 6.0, "kl_horizon": 16}}, ["ppo", "kl_horizon 16", "batch_size 32"]),
        ({"raft": {"temperature": 0.0}}, ["raft.temperature", "0.01", "0.0"]),
        ({"dpo": {"max_new_tokens": 10**15}}, ["dpo.max_new_tokens", "131072"]),
        ({"reward": {"torch_compile": "yes"}}, ["reward.torch_compile", "'auto'", "'yes'"]),
        ({"reward_model": {"revision": "abc"}}, ["reward_model", "'abc'", "classifier"]),
        ({"export": {"max_shard_size": "2 gigabytes"}}, ["export.max_shard_size", "2 gigabytes"]),
        ({"export": {"max_shard_size": "0GB"}}, ["export.max_shard_size", "0GB"]),
        ({"seed": None}, ["seed", "integer", "None"]),
        ({"ppo": 3}, ["ppo", "3"]),
        ([], ["expected a mapping of sections", "[]"]),
        (None, ["expected a mapping of sections", "None"]),
    ],
)
def test_a_fault_is_named_with_its_value(values: object, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        validate_params(values, "params.yaml")
    assert all(word in str(caught.value) for word in ["params.yaml", *words]), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"algorithm": "dpo", "model": {"quantization": "nf4"}, "ppo": {"method": "full"}, "raft": {"method": "freeze"}},
        {"algorithm": "kto", "model": {"quantization": "nf4"}, "ppo": {"method": "full"}},
        {"algorithm": "rrhf", "sft": {"method": "p_tuning"}, "ppo": {"method": "full"}},
        {"algorithm": "dpo", "sft": {"method": "p_tuning"}, "dpo": {"method": "p_tuning"}},
        {"sft": {"method": "p_tuning"}, "reward": {"method": "full", "init": "base"}},
        {"algorithm": "dpo", "rollout": VLLM, "model": {"quantization": "nf4"}},
        {"algorithm": "grpo", "rollout": VLLM, "ppo": {"method": "full"}},
    ],
)
def test_sections_of_other_algorithms_are_not_in_the_way(values: dict) -> None:
    assert validate_params(values).algorithm == values.get("algorithm", "ppo")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        validate_params({"seed": "x", "ppo": {"lam": 3, "gama": 1}})
    assert len(str(caught.value).splitlines()) == 3


def test_files_that_are_no_parameters(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(InputError, match="no such file"):
        load_params(path)
    path.write_text("seed: 1\n  ppo: {\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"params\.yaml, line 2: not valid YAML"):
        load_params(path)
    path.write_bytes(b"seed: \xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_params(path)


def test_overrides_reach_their_section_and_are_validated() -> None:
    assert load_params(ROOT / "params.yaml", {"ppo.learning_rate": 2e-5}).ppo.learning_rate == 2e-5
    with pytest.raises(InputError, match=r"did you mean ppo\.learning_rate\?"):
        load_params(ROOT / "params.yaml", {"ppo.learning_rte": 2e-5})
    with pytest.raises(InputError, match="'seed' is not a section"):
        load_params(ROOT / "params.yaml", {"seed.x": 1})


def test_the_defaults_are_valid() -> None:
    assert validate_params({}) == Params()


def load_yaml(path: Path) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
