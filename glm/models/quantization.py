"""int4 and int8 weights: the authors' packed format, and bitsandbytes.

The authors' format (`quantization_bit` in config.json; chatglm-6b-int4, chatglm-6b-int8, chatglm2-6b-int4 ...): the
linears of every block hold an int8 `weight` and a float `weight_scale` per output row, symmetric: weight = integer *
scale, scale = max|row| / (2^(bits-1) - 1). int4 keeps two values in a byte, the even column in the high half.
Embedding, norms and output layer stay as they are. The weights stay packed in memory and are unpacked in each forward
pass by plain torch on any device; the authors' cpm_kernels has no code for GPUs after sm_86.

It is registered with transformers as quantisation method "cpm", so that saving and loading work as for any other.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from glm.errors import InputError
from glm.models.checkpoint import LazyTensor

# Names of `quantization`, each with the bits of a weight.
CPM = {"cpm-int4": 4, "cpm-int8": 8}
BITSANDBYTES = {"nf4": 4, "fp4": 4, "int8": 8}
QUANTIZATIONS = (*CPM, *BITSANDBYTES)

# In this project's names and in the authors'.
BLOCK_LINEAR = re.compile(r"\.layers\.\d+\.(attention|self_attention|self_attn|mlp)\.\w+\.weight$")


def check_quantization(quantization: str | None) -> None:
    """Raise InputError unless `quantization` is None or one of `QUANTIZATIONS`."""
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise InputError(f"quantization: {quantization!r} is unknown; choose one of {', '.join(QUANTIZATIONS)}")


def bitsandbytes_config(quantization: str, dtype: torch.dtype, double_quantization: bool) -> BitsAndBytesConfig:
    """The transformers config of "nf4", "fp4" (Dettmers et al. 2023, QLoRA) or "int8" (Dettmers et al. 2022)."""
    if quantization == "int8":
        # It says at every product that its input is cast to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quantization,
    )


def keep_bitsandbytes_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The repacked weights compute in bfloat16 and cannot be trained on: LoRA training after an evaluation fails.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@torch.library.custom_op("glm::int8_product", mutates_args=())
def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """bitsandbytes' int8 product of x [..., in] with a weight [out, in]; backward as there, but without keeping x.

    bitsandbytes keeps the input outside of what checkpointing sees, so that it lives until the backward pass.
    """
    from bitsandbytes import MatmulLtState, matmul

    state = MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = weight, scale, threshold, False
    return matmul(x, weight, bias=bias, state=state)


@int8_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _int8_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    weight, scale = ctx.saved_tensors
    return gradient @ (weight.to(gradient.dtype) * (scale / 127)[:, None].to(gradient.dtype)), None, None, None, None


int8_product.register_autograd(_int8_backward, setup_context=_keep_weight)


class LeanInt8(nn.Module):
    """A frozen int8 linear of bitsandbytes that computes by `int8_product`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.weight.CB is not None:
            linear.init_8bit_state()
        self.codes, self.scale, self.threshold = linear.state.CB, linear.state.SCB, linear.state.threshold
        self.bias = None if linear.bias is None else linear.bias.data

    def forward(self, x: Tensor) -> Tensor:
        return int8_product(
            x, self.codes, self.scale, None if self.bias is None else self.bias.to(x.dtype), self.threshold
        )


@contextmanager
def lean_int8(model: nn.Module) -> Iterator[None]:
    """Inside, `LeanInt8` stand for the int8 linears of bitsandbytes that `model` has."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ == "Linear8bitLt"
    }
    for name, linear in linears.items():
        model.set_submodule(name, LeanInt8(linear))
    try:
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


def row_scales(weight: Tensor, bits: int) -> Tensor:
    """Scale of each row of a weight [out, in] -> [out], in float16 as the authors store it."""
    low, high = torch.aminmax(weight, dim=1)
    largest = torch.maximum(-low, high).float() / (2 ** (bits - 1) - 1)
    return largest.clamp(min=2**-24).half()  # the least positive float16, for rows of zeros


def pack(weight: Tensor, bits: int) -> Tensor:
    """Round a weight [out, in] to int8 [out, in], or to int4 pairs [out, in / 2]."""
    return torch.cat([_pack_rows(rows, bits) for rows in weight.split(512)])  # bounds the float32 copies


def _pack_rows(weight: Tensor, bits: int) -> Tensor:
    limit = 2 ** (bits - 1) - 1
    values = (weight.float() / row_scales(weight, bits).float()[:, None]).round().clamp(-limit, limit).to(torch.int8)
    if bits == 8:
        return values
    return (values[:, 0::2] << 4) | (values[:, 1::2] & 0x0F)


def unpack(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that packed integers and row scales stand for."""
    if bits == 4:
        # Shifts of int8 are arithmetic, so they restore the sign of each half.
        packed = torch.stack([packed >> 4, (packed << 4) >> 4], dim=-1).flatten(1)
    return packed.to(dtype) * scale.to(dtype)[:, None]


class _PackedProduct(torch.autograd.Function):
    """x @ weight.T whose backward pass unpacks the weight again instead of keeping it; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.bits = bits
        return F.linear(x, unpack(packed, scale, bits, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        return gradient @ unpack(packed, scale, ctx.bits, gradient.dtype), None, None, None


class PackedLinear(nn.Linear):
    """A linear whose weight is kept packed. It is an nn.Linear so that PEFT puts LoRA on it as on any other.

    `weight` int8 [out, in] or [out, in / 2], `weight_scale` [out]; neither is trained. PEFT's merging would have to
    write into the packed weight and fails: adapters stay beside it, or `load_model(dequantize=True)` unpacks it first.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.bits = bits
        columns = in_features * bits // 8
        self.weight = nn.Parameter(torch.empty(out_features, columns, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        output = _PackedProduct.apply(input, self.weight, self.weight_scale, self.bits)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


@register_quantization_config("cpm")
class CpmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model in the authors' packed format; `bits` is 4 or 8."""

    def __init__(self, bits: int, **kwargs: Any) -> None:
        self.quant_method = "cpm"
        self.bits = bits


@register_quantizer("cpm")
class CpmQuantizer(HfQuantizer):
    """Puts `PackedLinear` in place of the blocks' linears before packed weights are loaded."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        bits = self.quantization_config.bits
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and BLOCK_LINEAR.search(f".{name}.weight"):
                packed = PackedLinear(module.in_features, module.out_features, module.bias is not None, bits)
                model.set_submodule(name, packed.to("meta"))
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                has_bias, device = module.bias is not None, module.weight.device
                linear = nn.Linear(module.in_features, module.out_features, has_bias, device="meta")
                whole = unpack(module.weight, module.weight_scale, module.bits, dtype or module.weight_scale.dtype)
                linear.weight, linear.bias = nn.Parameter(whole.to(device)), module.bias
                model.set_submodule(name, linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # Lets transformers' Trainer train what is not packed, a P-Tuning v2 prefix above all, without PEFT.
        return True


def packed_on_read(state: dict[str, LazyTensor], bits: int) -> dict[str, LazyTensor]:
    """Have the blocks' linear weights of a full checkpoint packed when they are read, one tensor at a time."""
    packed: dict[str, LazyTensor] = {}
    for name, tensor in state.items():
        if not BLOCK_LINEAR.search(f".{name}"):
            packed[name] = tensor
            continue
        place = (tensor.checkpoint, tensor.name, tensor.rows)
        packed[name] = LazyTensor(*place, change=lambda weight: pack(weight, bits), dtype="I8")
        packed[f"{name}_scale"] = LazyTensor(*place, change=lambda weight: row_scales(weight, bits), dtype="F16")
    return packed
