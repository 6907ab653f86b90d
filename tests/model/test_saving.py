"""Saving: adapters and merged models are loaded again and compared before the save counts."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glm.errors import InputError
from glm.models import load_model, load_tokenizer
from glm.models.prefix import new_prefix
from glm.models.saving import probe_outputs, save_adapter, save_merged, save_prefix_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.tensor([[11, 12, 13, 14, 501, 504, 21, 22, 23]])
NAMES = ["chatglm1-tiny", "chatglm2-tiny"]


def with_lora(model, **options):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**settings | options))


@pytest.fixture
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer-chatglm2-tiny")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantization", [None, "cpm-int4"])
def test_adapter(name, quantization, tmp_path):
    model = with_lora(load_model(GOLDEN / name, dtype=torch.float32, quantization=quantization))
    model.add_adapter("policy", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.train()
    state = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    for adapter in ("default", "policy"):
        save_adapter(model, tmp_path / adapter, adapter)
        assert (tmp_path / adapter / "adapter_model.safetensors").exists()
        model.set_adapter(adapter)
        wanted = probe_outputs(model)
        options = {"dtype": torch.float32, "quantization": quantization}
        loaded = load_model(GOLDEN / name, adapters=[tmp_path / adapter], **options)
        torch.testing.assert_close(probe_outputs(loaded), wanted, atol=5e-5, rtol=0)
        model.set_adapter("default")
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == state
    assert list(model.peft_config) == ["default", "policy"] and model.active_adapters == ["default"] and model.training


@pytest.mark.parametrize("name", NAMES)
def test_merged_model(name, tokenizer, tmp_path):
    model = with_lora(load_model(GOLDEN / name, dtype=torch.float32))
    wanted = model(IDS).logits
    merged = save_merged(model, tokenizer, tmp_path / "merged", max_shard_size="200KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(IDS).logits, wanted, atol=5e-5, rtol=0)
    assert torch.equal(merged(IDS).logits, loaded(IDS).logits)
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    assert load_tokenizer(tmp_path / "merged")("你好")["input_ids"] == tokenizer("你好")["input_ids"]


def test_reward_model(tokenizer, tmp_path):
    model = load_model(GOLDEN / "chatglm1-tiny", dtype=torch.float32, task="sequence_classification")
    save_merged(model, tokenizer, tmp_path / "reward")
    again = load_model(tmp_path / "reward", task="sequence_classification")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_packed_model(tokenizer, tmp_path):
    model = load_model(GOLDEN / "chatglm1-tiny", quantization="cpm-int4", dtype=torch.float32)
    save_merged(model, tokenizer, tmp_path / "packed")
    saved = load_file(tmp_path / "packed" / "model.safetensors")
    assert saved["transformer.layers.0.mlp.dense_h_to_4h.weight"].shape == (256, 32)


@pytest.mark.parametrize("spoiled", ["adapter", "merged", "prefix"])
def test_a_save_that_does_not_give_the_same_outputs_does_not_count(spoiled, tokenizer, tmp_path, monkeypatch):
    """Bytes that change on their way to the disk: the folder is left as it was."""
    target = tmp_path / "saved"
    target.mkdir()
    (target / "kept").touch()
    model = load_model(GOLDEN / "chatglm2-tiny", dtype=torch.float32)
    if spoiled == "prefix":
        new_prefix(model, 4)
        monkeypatch.setattr("glm.models.prefix.save_file", spoiling(save_file))
        save = partial(save_prefix_adapter, model, target)
    elif spoiled == "merged":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", spoiling(save_file))
        save = partial(save_merged, model, tokenizer, target)
    else:
        model = with_lora(model)
        monkeypatch.setattr("peft.peft_model.safe_save_file", spoiling(save_file))
        save = partial(save_adapter, model, target)
    with pytest.raises(RuntimeError, match="saved: not saved: loaded again, it gives outputs that differ by"):
        save()
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def spoiling(write):
    def spoil(tensors, filename, metadata=None):
        largest = max(tensors, key=lambda name: tensors[name].numel())
        write(tensors | {largest: tensors[largest] * 1.5}, filename, metadata=metadata)

    return spoil


def test_what_cannot_be_merged_is_refused(tokenizer, tmp_path):
    packed = with_lora(load_model(GOLDEN / "chatglm2-tiny", dtype=torch.float32, quantization="cpm-int8"))
    with pytest.raises(InputError, match="cannot be merged into a quantised base"):
        save_merged(packed, tokenizer, tmp_path / "merged")
    prefixed = load_model(GOLDEN / "chatglm2-tiny", dtype=torch.float32)
    new_prefix(prefixed, 4)
    with pytest.raises(InputError, match="prefix cannot be merged"):
        save_merged(prefixed, tokenizer, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
