"""int4 and int8: the authors' packed format and bitsandbytes. Parity with the original is in test_parity.py."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from glm.errors import InputError
from glm.models import load_model
from glm.models.quantization import PackedLinear, pack, row_scales, unpack

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.tensor([[11, 12, 13, 14, 501, 504, 21, 22, 23], [31, 32, 33, 34, 501, 504, 24, 25, 26]])


def test_int4_layout():
    """Even columns stand in the high half of a byte, odd ones in the low half, both as two's complement."""
    packed = torch.tensor([[0x7F, 0x91 - 256]], dtype=torch.int8)  # 7 and -1; -7 and 1
    assert unpack(packed, torch.tensor([0.5]), 4, torch.float32).tolist() == [[3.5, -0.5, -3.5, 0.5]]


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_rounding_to_the_nearest_step(bits):
    weight = torch.randn(1030, 64, generator=torch.Generator().manual_seed(0))
    weight[5] = 0
    packed, scale = pack(weight, bits), row_scales(weight, bits)
    assert packed.dtype == torch.int8 and packed.shape == (1030, 64 * bits // 8)
    assert scale.dtype == torch.float16
    restored = unpack(packed, scale, bits, torch.float32)
    # Half a step, and a little more at the ends since the scale itself is rounded to float16.
    assert ((restored - weight).abs() <= 0.51 * scale.float()[:, None]).all()
    assert torch.equal(pack(restored, bits), packed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_linear_computes_and_differentiates_as_its_unpacked_weight(bits, autocast):
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 32), torch.randn(24)
    linear = PackedLinear(32, 24, bias=True, bits=bits)
    linear.weight.data, linear.weight_scale.data = pack(weight, bits), row_scales(weight, bits)
    linear.bias = nn.Parameter(bias)
    dense = unpack(linear.weight, linear.weight_scale, bits, torch.float32)
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = torch.randn(2, 5, 32).copy_(x.detach()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, wanted = linear(x), F.linear(y, dense, bias)
    assert got.dtype == wanted.dtype
    tolerance = {"atol": 0.1, "rtol": 0.02} if autocast else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(got, wanted, **tolerance)
    got.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=5.0 if autocast else 1e-3, rtol=0.02 if autocast else 1e-4)
    assert linear.weight.grad is None and linear.weight_scale.grad is None
    bias_gradient = 2 * wanted.sum((0, 1)).float()
    torch.testing.assert_close(linear.bias.grad, bias_gradient, atol=2.0 if autocast else 1e-3, rtol=0.02)


@pytest.mark.parametrize("folder", ["chatglm1-tiny", "chatglm2-tiny"])
@pytest.mark.parametrize(("quantization", "bits"), [("cpm-int4", 4), ("cpm-int8", 8)])
def test_packing_a_full_checkpoint_on_load(folder, quantization, bits):
    full = load_model(GOLDEN / folder, dtype=torch.float32)
    packed = load_model(GOLDEN / folder, dtype=torch.float32, quantization=quantization)
    checked = 0
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            weight = full.get_submodule(name).weight
            assert torch.equal(module.weight, pack(weight, bits)), name
            assert torch.equal(module.weight_scale, row_scales(weight, bits).float()), name
            checked += 1
    assert checked == 2 * (4 if folder == "chatglm1-tiny" else 6)
    assert type(packed.lm_head) is nn.Linear
    # The same numbers as a full model that holds the rounded weights.
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            full.get_submodule(name).weight.data = unpack(module.weight, module.weight_scale, bits, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS).logits, full(IDS).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("folder", [f"chatglm{n}-tiny-int{bits}" for n in (1, 2) for bits in (4, 8)])
def test_published_packed_checkpoints_are_tuned_with_lora_and_saved(folder, tmp_path):
    model = load_model(GOLDEN / folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert train_lora(model) < 0.7
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    clean = load_model(GOLDEN / folder, dtype=torch.float32)
    clean.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert any(isinstance(module, PackedLinear) for module in again.modules())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, clean(IDS).logits)


@pytest.mark.parametrize("folder", ["chatglm1-tiny", "chatglm2-tiny"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_bitsandbytes(folder, quantization):
    model = load_model(GOLDEN / folder, dtype=torch.float32, quantization=quantization)
    with torch.no_grad():
        logits = model(IDS).logits  # an evaluation first: training must still work after it
        full = load_model(GOLDEN / folder, dtype=torch.float32)(IDS).logits
    assert 0 < (logits - full).abs().mean() < (0.05 if quantization == "int8" else 0.4) * full.abs().mean()
    assert train_lora(model) < 0.7


def test_double_quantization_is_optional():
    for double in (True, False):
        model = load_model(GOLDEN / "chatglm2-tiny", quantization="nf4", double_quantization=double)
        assert model.model.layers[0].mlp.down_proj.weight.quant_state.nested is double


def train_lora(model):
    """Ratio of the loss after a few steps of LoRA to the loss before."""
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tuned.eval()
    return losses[-1] / losses[0]


def test_wrong_quantization_is_refused_before_loading(tmp_path):
    with pytest.raises(InputError, match="quantization: 'int3' is unknown; choose one of cpm-int4"):
        load_model(GOLDEN / "chatglm2-tiny", quantization="int3")
    with pytest.raises(InputError, match="is int4 already"):
        load_model(GOLDEN / "chatglm2-tiny-int4", quantization="cpm-int8")
    config = json.loads((GOLDEN / "chatglm2-tiny" / "config.json").read_text()) | {"quantization_bit": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "chatglm2-tiny" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"config\.json: quantization_bit is 3"):
        load_model(tmp_path)
