"""Glm layers in fewer steps, int8 products that keep nothing: transformers and bitsandbytes give the same numbers."""

import gc
import weakref
from functools import partial

import pytest
import torch

from glm.config import Reward, Sft
from glm.models.adapters import add_lora
from glm.models.packed_attention import VARLEN, attention_of, packed_implementation
from glm.models.quantization import LeanInt8, lean_int8
from glm.training.fused_layer import can_fuse
from glm.training.layers import MODES, layers_run
from glm.training.reward import RankingCollator, RewardLoss, RewardModel
from glm.training.sft import SftCollator, SftLoss
from tests.model.test_packing import PACKING, adapted, assert_same, examples, make, step_loss

TARGETS = ["all-linear", ["query_key_value"], ["q_proj", "v_proj", "down_proj"]]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_fused_layers_give_the_loss_and_gradients_of_the_padded_run(target: list[str] | str) -> None:
    model, rows = adapted("glm", lora_target=target), examples()
    base = model.get_base_model()
    padded = step_loss(SftLoss(model), SftCollator(0, None, 3)(rows))
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    for mode in MODES:
        with attention_of(base, VARLEN), layers_run(base, compiled=False, checkpointing=mode, fused=True):
            assert_same(step_loss(SftLoss(model, fused=True), SftCollator(0, PACKING, 3)(rows)), padded)
    storages = {weight.untyped_storage().data_ptr() for weight in base.state_dict().values()}
    assert len(storages) == len(weights)  # every weight has its own memory again, as saving wants it
    assert all(torch.equal(weight, weights[name]) for name, weight in base.state_dict().items())


def test_a_lora_above_another_is_fused_with_it() -> None:
    model = add_lora(adapted("glm"), Sft(lora_rank=2, lora_alpha=4, lora_dropout=0.0), name="above")
    for key, parameter in model.named_parameters():
        if "lora_B.above" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    base, rows = model.get_base_model(), examples()
    padded = step_loss(SftLoss(model), SftCollator(0, None, 3)(rows))
    with attention_of(base, VARLEN), layers_run(base, compiled=False, checkpointing="none", fused=True):
        assert_same(step_loss(SftLoss(model, fused=True), SftCollator(0, PACKING, 3)(rows)), padded)


def test_fused_reward_layers_score_as_the_padded_run() -> None:
    model, sequences = adapted("glm"), [row["input_ids"] for row in examples(9)]
    rankings = [{"sequences": part} for part in (sequences[:2], sequences[2:5], sequences[5:7], sequences[7:])]
    rankings = [ranking for ranking in rankings if sum(map(len, ranking["sequences"])) <= 64]
    reward = RewardModel(model, torch.nn.Linear(32, 1, bias=False))
    padded = step_loss(RewardLoss(reward, Reward()), RankingCollator(0, None, 3)(rankings))
    base = model.get_base_model()
    with attention_of(base, VARLEN), layers_run(base, compiled=False, checkpointing="none", fused=True):
        packed = RankingCollator(0, PACKING, 3)(rankings)
        assert_same(step_loss(RewardLoss(reward, Reward(), fused=True), packed), padded)


def test_compiled_fused_layers_share_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # in bfloat16, as on a GPU, and with a mask: attention one by one asks for the lengths
    model = add_lora(make("glm").bfloat16(), Sft(lora_rank=4, lora_dropout=0.0, lora_target=["query_key_value"]))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    base, batch = model.get_base_model(), SftCollator(0, PACKING, 3)(examples(9))
    batch["micro_batches"] = [part for part in batch["micro_batches"] if part["input_ids"].shape[1] == 64]
    assert len(batch["micro_batches"]) > 1
    with attention_of(base, packed_implementation(base, "flex_attention")):
        plain = step_loss(SftLoss(model), batch)
        with layers_run(base, compiled=True, checkpointing="none", fused=True):
            found = step_loss(SftLoss(model, fused=True).train(), batch)
    assert found[0] == pytest.approx(plain[0], rel=2e-3)
    for key, gradient in plain[1].items():
        assert torch.cosine_similarity(found[1][key].flatten(), gradient.flatten(), dim=0) > 0.999, key
    # the first layer's input takes no gradient, the last one's positions are few or many: twice
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_is_not_a_glm_under_plain_loras_is_not_fused() -> None:
    assert can_fuse(adapted("glm").get_base_model())
    assert not can_fuse(adapted("qwen2").get_base_model())
    assert not can_fuse(adapted("glm", use_dora=True).get_base_model())
    assert not can_fuse(add_lora(make("glm"), Sft(lora_dropout=0.1)).get_base_model())
    assert not can_fuse(make("glm"))  # its own weights are trained


def test_int8_products_keep_no_input_and_have_the_gradients_of_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 48)
    holder = torch.nn.Module()
    holder.linear = bitsandbytes.nn.Linear8bitLt(32, 48, has_fp16_weights=False, threshold=6.0)
    holder.linear.load_state_dict(linear.state_dict())
    holder.linear.to("cpu")
    inputs, gradient = torch.randn(5, 7, 32, requires_grad=True), torch.randn(5, 7, 48)
    wanted = holder.linear(inputs)
    torch.testing.assert_close(wanted, linear(inputs), atol=0.05, rtol=0.05)
    (of_inputs,) = torch.autograd.grad(wanted, inputs, gradient)
    with lean_int8(holder):
        assert isinstance(holder.linear, LeanInt8)
        copy = inputs * 1.0
        found = holder.linear(copy)
        torch.testing.assert_close(found, wanted)
        alive = weakref.ref(copy)
        torch.testing.assert_close(torch.autograd.grad(found, inputs, gradient, retain_graph=True)[0], of_inputs)
        del copy
        gc.collect()
        assert alive() is None and found.grad_fn is not None
    assert type(holder.linear) is bitsandbytes.nn.Linear8bitLt
