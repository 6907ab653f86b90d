"""load_model: layouts, what is refused, adapters, and memory."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from glm.errors import InputError
from glm.models import load_model
from glm.models.chatglm2 import glm_config
from glm.models.loading import recognise

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
IDS = torch.tensor([[11, 12, 13, 14, 501, 504, 21, 22, 23]])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "pad_token_id": 0}


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny ChatGLM2 checkpoint, to spoil."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "chatglm2-tiny" / name, tmp_path / name)
    return tmp_path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def as_bin_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{n % 2 + 1:05}-of-00002.bin" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "pytorch_model-00002-of-00002.bin"


def refused(folder, **options):
    """The one-line message with which loading is refused."""
    with pytest.raises(InputError) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def original_layout(model, folder, **config):
    """Write a Glm model the way ChatGLM2's authors do: their names, one fused q/k/v, their config fields."""
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.layers": "transformer.encoder.layers",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    state, original = model.state_dict(), {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "self_attention.query_key_value")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        original[name] = tensor.contiguous()
    original["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
    folder.mkdir(exist_ok=True)
    save_file(original, folder / "model.safetensors")
    c = model.config
    fields = {
        "model_type": "chatglm",
        "padded_vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "ffn_hidden_size": c.intermediate_size,
        "num_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "kv_channels": c.head_dim,
        "multi_query_attention": c.num_key_value_heads != c.num_attention_heads,
        "multi_query_group_num": c.num_key_value_heads,
        "add_qkv_bias": c.attention_bias,
        "layernorm_epsilon": c.rms_norm_eps,
        "seq_length": c.max_position_embeddings,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(fields | config))


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, {}),  # 6 * 8 is not hidden_size
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}, {}),  # no groups
        ({"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 4, "attention_bias": False}, {}),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 5e6}, {"rope_ratio": 500}),
    ],
    ids=["wide heads", "no groups", "one group, no bias", "GLM-4's rope"],
)
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_shapes_of_the_original_layout(shape, config, task, tmp_path):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta", 10000.0), "partial_rotary_factor": 0.5}
    model = GlmForCausalLM(GlmConfig(**SIZES | shape, rope_parameters=rope, eos_token_id=[1, 2])).eval()
    shape["rope_theta"] = rope["rope_theta"]  # parametrised values are shared between tests
    original_layout(model, tmp_path, **config)
    loaded = load_model(tmp_path, task=task)
    assert loaded.config.rope_parameters == rope
    assert loaded.config.eos_token_id == [1, 2]
    with torch.no_grad():
        if task == "causal_lm":
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        else:
            assert isinstance(loaded, GlmForSequenceClassification)
            assert torch.equal(loaded.model(IDS)[0], model.model(IDS)[0])


@pytest.mark.parametrize(
    ("name", "rope", "kind", "theta"),
    [
        ("THUDM/chatglm2-6b-32k", "auto", "linear", 10000),
        ("THUDM/chatglm3-6b-32k", "auto", "default", 500000),
        ("", "auto", "default", 500000),
        ("THUDM/chatglm2-6b-32k", "base", "default", 500000),
        ("THUDM/chatglm3-6b-32k", "linear", "linear", 10000),
    ],
)
def test_meaning_of_rope_ratio(name, rope, kind, theta):
    config = json.loads((GOLDEN / "chatglm3-32k-tiny" / "config.json").read_text()) | {"_name_or_path": name}
    parameters = glm_config(config, Path("config.json"), rope).rope_parameters
    assert (parameters["rope_type"], parameters["rope_theta"]) == (kind, theta)
    assert parameters.get("factor", 50) == 50


def test_saved_glm_folder_needs_nothing_of_this_project(tmp_path):
    model = load_model(GOLDEN / "chatglm3-32k-tiny", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save(model(IDS).logits, tmp_path / "logits.pt")
    code = (
        "import torch; from transformers import AutoModelForCausalLM as Auto; model = Auto.from_pretrained('.');"
        f"assert type(model).__name__ == 'GlmForCausalLM'; logits = model(torch.tensor({IDS.tolist()})).logits;"
        "assert torch.equal(logits, torch.load('logits.pt')); import sys; assert 'glm.models' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)
    packed = load_model(tmp_path, quantization="cpm-int8")
    assert packed.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8


def test_other_causal_models_load_as_they_are(tmp_path):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)
    assert load_model(tmp_path, task="sequence_classification", num_labels=3).score.out_features == 3
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert "nf4, fp4 or int8" in refused(tmp_path, quantization="cpm-int4")


def test_a_hub_id_is_found_in_the_cache(tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(GOLDEN / "chatglm2-tiny", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    code = (
        "from glm.models import load_model; from glm.errors import InputError\n"
        f"for revision in (None, {commit!r}):\n"
        "    assert load_model('someone/tiny', revision=revision).config.vocab_size == 512\n"
        "try: load_model('someone/other')\n"
        "except InputError as error: assert str(error).startswith('someone/other: no such folder, and not to be had')\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_dtype_device_and_attention(folder):
    model = load_model(folder)
    assert model.dtype == torch.float16 and not model.training  # the checkpoint's own
    model = load_model(folder, dtype="bfloat16", device="cpu", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert "dtype: 'float7' is unknown" in refused(folder, dtype="float7")


def test_truncated_files(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(folder).startswith(f"{file}: truncated or damaged: ")
    shutil.copy(GOLDEN / "chatglm2-tiny" / "model.safetensors", file)
    shard = as_bin_shards(folder)
    content = shard.read_bytes()
    for size in (0, 1000, len(content) - 100):
        shard.write_bytes(content[:size])
        assert refused(folder).startswith(f"{shard}: truncated or damaged: ")


def test_missing_files(folder):
    shard = as_bin_shards(folder)
    content = torch.load(shard, weights_only=True)
    lost = sorted(content)[0]
    torch.save({name: tensor for name, tensor in content.items() if name != lost}, shard)
    assert refused(folder) == f"{shard}: lacks {lost}, which the index promises (1 such tensors)"
    shard.unlink()
    assert refused(folder).startswith(f"{shard}: missing, though pytorch_model.bin.index.json says")
    (folder / "pytorch_model.bin.index.json").unlink()
    assert refused(folder).startswith(f"{folder}: no weights; looked for model.safetensors.index.json, ")
    (folder / "config.json").write_text("{")
    assert refused(folder).startswith(f"{folder / 'config.json'}: not JSON")
    (folder / "config.json").unlink()
    assert refused(folder).startswith(f"{folder / 'config.json'}: missing")
    assert refused(folder / "nowhere") == f"{folder / 'nowhere'}: no such folder"


def test_an_index_does_not_lead_out_of_the_folder(folder):
    as_bin_shards(folder)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../config.json"}}))
    assert "names the shard '../config.json', which is not a file of the same folder" in refused(folder)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickled_payload_is_refused_and_not_run(folder, save, monkeypatch):
    monkeypatch.chdir(folder)
    shard = as_bin_shards(folder)
    save({"a": Payload()}, shard)
    assert refused(folder).startswith(f"{shard}: refused: it holds pickled objects other than tensors (")
    assert not (folder / "harmed").exists()


def test_weights_that_do_not_fit_the_config(folder):
    file = folder / "model.safetensors"
    change_config(folder, padded_vocab_size=600)
    assert refused(folder).startswith(f"{file}: transformer.embedding.word_embeddings.weight has 512 rows, but")
    change_config(folder, padded_vocab_size=512, multi_query_group_num=1)
    assert "has 128 rows, but config.json asks for 96 (4 + 2 * 1 heads of 16)" in refused(folder)
    change_config(folder, multi_query_group_num=2, ffn_hidden_size=64)
    assert refused(folder).startswith(f"{folder}: the weights do not fit config.json: ")
    change_config(folder, ffn_hidden_size=96, num_layers=3)
    assert refused(folder).startswith(f"{folder}: the weights lack model.layers.2.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padded_vocab_size": None}, "model_type is chatglm, but there is neither padded_vocab_size"),
        ({"model_type": "gpt99"}, "model_type is 'gpt99', neither chatglm nor a causal_lm of transformers (unknown"),
        ({"model_type": None}, "model_type is None, neither"),
        ({"model_type": "vit"}, "(another kind of model)"),
        ({"kv_channels": None}, "kv_channels is missing"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"vision_config": {}}, "GLM-4V"),
    ],
)
def test_configs_that_fit_none(folder, changes, message):
    change_config(folder, **changes)
    said = refused(folder)
    assert said.startswith(f"{folder / 'config.json'}: ") and message in said


def test_generation_is_told_by_the_config_alone():
    for name, generation in {"chatglm1-tiny": "chatglm1", "chatglm2-tiny": "chatglm2"}.items():
        config = json.loads((GOLDEN / name / "config.json").read_text())
        assert recognise(config | {"eos_token_id": 7, "_name_or_path": ""}, Path("config.json")) == generation


def lora(folder, base, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_model(base, dtype=torch.float32), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("name", ["chatglm1-tiny", "chatglm2-tiny"])
def test_adapters_are_merged_in_order_or_kept_beside_a_quantised_base(name, tmp_path):
    base = GOLDEN / name
    adapters = [lora(tmp_path / str(seed), base, seed) for seed in (1, 2)]
    model = load_model(base, adapters=adapters, dtype=torch.float32)
    assert not any("lora" in key for key, _ in model.named_parameters())
    expected = load_model(base, dtype=torch.float32)
    for adapter in adapters:
        expected = PeftModel.from_pretrained(expected, adapter).merge_and_unload()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        only_first = load_model(base, adapters=adapters[:1], dtype=torch.float32)(IDS).logits
        assert (model(IDS).logits - only_first).abs().max() > 0.1
        # Beside an int8 base the same adapters give nearly the same result.
        beside = load_model(base, adapters=adapters, dtype=torch.float32, quantization="cpm-int8")
        assert any("lora" in key for key, _ in beside.named_parameters())
        assert (beside(IDS).logits - model(IDS).logits).abs().max() < 0.1 * model(IDS).logits.abs().max()


def test_lora_and_prefix_together(tmp_path):
    base = GOLDEN / "chatglm1-tiny-ptuning"
    adapter, prefix = lora(tmp_path, GOLDEN / "chatglm1-tiny", 1), base / "prefix_encoder.safetensors"
    with torch.no_grad():
        either_order = [
            load_model(base, adapters=order, dtype=torch.float32)(IDS).logits
            for order in ([adapter, prefix], [prefix, adapter])
        ]
        torch.testing.assert_close(*either_order, atol=2e-5, rtol=0)
        alone = load_model(base, adapters=[adapter], dtype=torch.float32)(IDS).logits
    assert (either_order[0] - alone).abs().max() > 0.1


def test_a_checkpoint_of_the_authors_ptuning_code(tmp_path):
    """As a base it brings its prefix along; as an adapter only the prefix is taken from it."""
    source = GOLDEN / "chatglm2-tiny-ptuning"
    prefix = load_file(source / "prefix_encoder.safetensors")
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    save_file(load_file(source / "model.safetensors") | prefix, tmp_path / "whole" / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path / "whole" / "config.json")
    torch.save(prefix, tmp_path / "part" / "pytorch_model.bin")
    with torch.no_grad():
        wanted = load_model(source, adapters=[source / "prefix_encoder.safetensors"])(IDS).logits
        assert torch.equal(load_model(tmp_path / "whole")(IDS).logits, wanted)
        assert torch.equal(load_model(source, adapters=[tmp_path / "part"])(IDS).logits, wanted)


def test_a_folder_without_an_adapter_is_refused(folder, tmp_path):
    assert "no adapter; looked for adapter_config.json" in refused(folder, adapters=[GOLDEN / "chatglm2-tiny"])
    assert "no such folder" in refused(folder, adapters=[tmp_path / "nowhere"])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_is_the_model_plus_one_shard(suffix, tmp_path):
    """Eight float16 shards of 16 MB, loaded in float32: 256 MB of model. Holding all shards would take 128 MB more."""
    shard_rows, hidden, layers = 8192, 1024, 7
    torch.manual_seed(0)
    config = GlmConfig(
        hidden_size=hidden,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=shard_rows // 2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    model = model.half().to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    original_layout(model, tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.output_layer.weight"]
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for name in tensors:
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        weight_map[name] = f"{part}.{suffix}"
    for file in set(weight_map.values()):
        shard = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(shard, tmp_path / file) if suffix == "safetensors" else torch.save(shard, tmp_path / file)
    index = "model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    code = (
        "import re, sys; from glm.models import load_model\n"
        "kilobytes = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = kilobytes('VmRSS'); model = load_model(sys.argv[1], dtype='float32')\n"
        "size = sum(p.numel() * 4 for p in model.parameters()) // 1024\n"
        "print(kilobytes('VmHWM') - before, size)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, env=environment, timeout=120, capture_output=True, text=True).stdout
    peak, model_size = map(int, output.split())
    shard_size = max(path.stat().st_size for path in tmp_path.glob(f"*.{suffix}")) // 1024
    everything = sum(path.stat().st_size for path in tmp_path.glob(f"*.{suffix}")) // 1024
    slack = 24 * 1024  # libraries that load on the way
    assert shard_size + slack < everything / 2, "the test could not tell"
    assert peak < model_size + shard_size + slack
