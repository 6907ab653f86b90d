"""Do the models compute on a GPU in bfloat16 what they compute on the CPU in float32, at the real 6B and 9B widths?

    python -m benchmarks.models_gpu                # 4 layers of each model, about two minutes on one H100
    python -m benchmarks.models_gpu --layers 0     # all layers (28; GLM-4: 40): 40 GB of host memory

Random weights, drawn on the GPU in bfloat16 and copied to the CPU, so that both sides hold the same numbers. Each row
compares the logits of a left-padded batch. The yardstick is the bfloat16 error of the CPU itself: a row passes if the
GPU's error against float32 is at most twice that. `cached` decodes the last tokens one by one from the cache; `int8`
and `int4` are the authors' packed linears, against float32 with the same packed numbers. Speeds are of bfloat16 sdpa:
tokens a second of a forward pass over the batch, and of greedy decoding. The last rows load the tiny checkpoints of
tests/golden onto the device in float32 and compare with what the original code computed (largest difference of the
logits), and bitsandbytes' with their full model. Exit status 0 only if every row passes.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from glm.models import load_model
from glm.models.chatglm1 import ChatGLMConfig, ChatGLMForCausalLM
from glm.models.quantization import PackedLinear, pack, row_scales, unpack

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
BATCH, LENGTH, PADDED, DECODED = 2, 128, 17, 4


def chatglm1(layers: int) -> ChatGLMForCausalLM:
    return ChatGLMForCausalLM(ChatGLMConfig(num_layers=layers or 28))


def glm(layers: int, **shape: object) -> GlmForCausalLM:
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta"), "partial_rotary_factor": 0.5}
    return GlmForCausalLM(GlmConfig(num_hidden_layers=layers, rope_parameters=rope, **shape))


def chatglm2(layers: int) -> GlmForCausalLM:
    return glm(layers or 28, vocab_size=65024, rms_norm_eps=1e-5, rope_theta=1e4, eos_token_id=2, pad_token_id=0)


def chatglm3_32k(layers: int) -> GlmForCausalLM:
    return glm(layers or 28, vocab_size=65024, rms_norm_eps=1e-5, rope_theta=5e5, eos_token_id=2, pad_token_id=0)


def glm4(layers: int) -> GlmForCausalLM:
    return glm(layers or 40, vocab_size=151552, rms_norm_eps=1.5625e-07, rope_theta=5e6)


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "ChatGLM-6B": chatglm1,
    "ChatGLM2-6B": chatglm2,
    "ChatGLM3-6B-32k": chatglm3_32k,
    "GLM-4-9B": glm4,
}


def build(make: Callable[[int], PreTrainedModel], layers: int, device: str) -> PreTrainedModel:
    """A model with weights of standard deviation 0.02, in bfloat16 on `device`."""
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return make(layers).eval()
        finally:
            torch.set_default_dtype(default)


def batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Random tokens, the second row padded on the left, with the positions that belong to them."""
    config = model.config
    ids = torch.randint(100, 60000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :PADDED], mask[1, :PADDED] = config.pad_token_id, 0
    if isinstance(config, ChatGLMConfig):
        ids[:, LENGTH // 2], ids[:, LENGTH // 2 + 1] = config.gmask_token_id, config.bos_token_id
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor], cached: bool = False) -> Tensor:
    """Logits of the real tokens in float32 on the CPU; with `cached` the last ones come from single decoding steps."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if not cached:
        found = model(**inputs).logits
    else:
        start = LENGTH - DECODED
        output = model(**{name: tensor[:, :start] for name, tensor in inputs.items()}, use_cache=True)
        parts = [output.logits]
        for end in range(start + 1, LENGTH + 1):
            step = {name: tensor[:, end - 1 : end] for name, tensor in inputs.items()}
            step["attention_mask"] = inputs["attention_mask"][:, :end]
            output = model(**step, past_key_values=output.past_key_values)
            parts.append(output.logits)
        found = torch.cat(parts, dim=1)
    return found[inputs["attention_mask"].bool()].float().cpu()


def error(found: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, relative to the reference's."""
    return ((found - reference).square().mean() / reference.square().mean()).sqrt().item()


@torch.no_grad()
def pack_linears(model: PreTrainedModel, bits: int) -> None:
    """Put the blocks' linears into the authors' packed format, in place."""
    for name, linear in list(model.base_model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, bits)
            packed.weight.data = pack(linear.weight, bits)
            packed.weight_scale.data = row_scales(linear.weight, bits).to(linear.weight.dtype)
            packed.bias = linear.bias
            model.base_model.layers.set_submodule(name, packed)


def speeds(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Tokens a second: a forward pass over the whole batch, and greedy decoding of 32 tokens a row."""
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)

    def seconds(run: Callable[[], object]) -> float:
        run()
        synchronize(model)
        start = time.perf_counter()
        run()
        synchronize(model)
        return time.perf_counter() - start

    with torch.no_grad():
        forward = seconds(lambda: model(input_ids=ids, attention_mask=mask))
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    decoding = seconds(lambda: model.generate(input_ids=ids, attention_mask=mask, **settings))
    return BATCH * LENGTH / forward, BATCH * 32 / decoding


def synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def compare(name: str, make: Callable[[int], PreTrainedModel], layers: int, device: str, table: Table) -> bool:
    model = build(make, layers, device)
    inputs = batch(model)
    passed = True

    def row(what: str, found: float, allowed: float, speed: tuple[float, float] | None = None) -> None:
        nonlocal passed
        good = found <= allowed
        passed &= good
        rates = [f"{rate:.0f}" for rate in speed] if speed else ["", ""]
        table.add_row(name, what, f"{found:.2e}", f"{allowed:.2e}", *rates, "ok" if good else "[red]FAIL")

    with torch.device("meta"):
        reference = make(layers)
    state = {key: tensor.to("cpu", torch.bfloat16) for key, tensor in model.state_dict().items()}
    reference.load_state_dict(state, assign=True)
    reference.tie_weights()
    buffers = dict(model.named_buffers())
    for key, _ in list(reference.named_buffers()):  # rope tables: not in the state, and float32 on both sides
        owner, _, leaf = key.rpartition(".")
        reference.get_submodule(owner)._buffers[leaf] = buffers[key].cpu()
    reference.eval()
    yardstick_logits = logits(reference, inputs)
    reference.float()
    exact = logits(reference, inputs)
    allowed = 2 * error(yardstick_logits, exact)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        speed = speeds(model, inputs) if attention == "sdpa" else None
        row(attention, error(logits(model, inputs), exact), allowed, speed)
        row(f"{attention}, cached", error(logits(model, inputs, cached=True), exact), allowed)
    model.set_attn_implementation("sdpa")
    for bits in (8, 4):
        if bits == 4:
            model = build(make, layers, device)
        pack_linears(model, bits)
        for key, packed in model.base_model.layers.named_modules():
            if isinstance(packed, PackedLinear):
                dense = reference.base_model.layers.get_submodule(key)
                dense.weight.data = unpacked_on_cpu(packed)
        row(f"int{bits}", error(logits(model, inputs), logits(reference, inputs)), allowed, speeds(model, inputs))
    return passed


@torch.no_grad()
def compare_golden(folder: Path, device: str, table: Table) -> bool:
    """Load a tiny checkpoint onto the device and compare its first case with the recorded logits."""
    case = json.loads((folder / "inputs.json").read_text())["cases"][0]
    wanted = load_file(folder / "expected.safetensors")[f"{case['name']}.logits"]
    prefix = folder / "prefix_encoder.safetensors"
    adapters = [prefix] if prefix.exists() else []
    passed = True
    for quantization in (None, "nf4", "int8") if folder.name in ("chatglm1-tiny", "chatglm2-tiny") else (None,):
        if quantization is not None and find_spec("bitsandbytes") is None:
            table.add_row(folder.name, quantization, "", "", "", "", "left out: no bitsandbytes here")
            continue
        model = load_model(folder, adapters=adapters, device=device, dtype=torch.float32, quantization=quantization)
        found = model(torch.tensor(case["input_ids"], device=device)).logits.float().cpu()
        difference = (found - wanted).abs().max().item() if quantization is None else error(found, wanted)
        allowed = {None: 2e-4, "nf4": 0.4, "int8": 0.05}[quantization]
        good = difference <= allowed
        passed &= good
        what = "recorded" if quantization is None else quantization
        table.add_row(folder.name, what, f"{difference:.2e}", f"{allowed:.2e}", "", "", "ok" if good else "[red]FAIL")
    return passed


def unpacked_on_cpu(packed: PackedLinear) -> Tensor:
    """The float32 weight, unpacked by the CPU: so a fault of the GPU's unpacking would show."""
    return unpack(packed.weight.data.cpu(), packed.weight_scale.data.cpu(), packed.bits, torch.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description="bfloat16 on a GPU against float32 on the CPU")
    parser.add_argument("--layers", type=int, default=4, help="layers of each model; 0: as published")
    parser.add_argument("--device", default="cuda", help="'cpu' tries the script out without a GPU")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    table = Table("model", "what", "error", "allowed", "forward tok/s", "decode tok/s", "")
    passed = True
    for name in options.models:
        start = time.perf_counter()
        passed &= compare(name, MODELS[name], options.layers, options.device, table)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    for folder in sorted(GOLDEN.glob("chatglm*-tiny*")):
        passed &= compare_golden(folder, options.device, table)
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    table.title = f"{device}, torch {torch.__version__}, {options.layers or 'all'} layers, batch {BATCH} x {LENGTH}"
    Console(width=120).print(table)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
