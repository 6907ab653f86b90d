"""Models of real shapes with random weights, and examples of real lengths, for the benchmarks."""

import gc
import random
from typing import Any

import torch
from torch import nn
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from glm.models.chatglm1 import ChatGLMConfig, ChatGLMForCausalLM

LENGTHS = "log-normal (5.07, 0.7), 24 to 1,024"
CHATGLM2 = {"vocab_size": 65024, "rms_norm_eps": 1e-5, "eos_token_id": 2, "pad_token_id": 0, "attention_bias": True}
CHATGLM1_GMASK, CHATGLM1_BOS = 130001, 130004


def length(rng: random.Random) -> int:
    return int(min(1024, max(24, rng.lognormvariate(5.07, 0.7))))


def examples(count: int = 3000) -> list[dict[str, Any]]:
    """Random tokens of the stated lengths; labels on the last three quarters."""
    rng, found = random.Random(0), []
    for size in [length(rng) for _ in range(count)]:
        ids = [rng.randrange(100, 64000) for _ in range(size)]
        found.append({"input_ids": ids, "labels": [-100] * (size // 4) + ids[size // 4 :]})
    return found


def prefix_examples() -> list[dict[str, Any]]:
    """The same, each prompt closed by ChatGLM-6B's [gMASK] and <sop>."""
    for example in (found := examples()):
        prompt = len(example["input_ids"]) // 4
        example["input_ids"][prompt - 2 : prompt] = [CHATGLM1_GMASK, CHATGLM1_BOS]
    return found


def pairs() -> list[dict[str, Any]]:
    """The same sequences, two to a ranking."""
    ids = [example["input_ids"] for example in examples()]
    return [{"sequences": [better, worse]} for better, worse in zip(ids[::2], ids[1::2], strict=True)]


def rankings(prompt: int, answers: int, marks: tuple[int, ...] = (), count: int = 1500) -> list[dict[str, Any]]:
    """Random tokens: prompts of half to one and a half times `prompt` and so many answers to each, of 64 to 192 tokens.

    A prompt ends with `marks`.
    """
    rng, found = random.Random(0), []

    def tokens(size: int) -> list[int]:
        return [rng.randrange(100, 64000) for _ in range(size)]

    for _ in range(count):
        start = [*tokens(rng.randint(prompt // 2, 3 * prompt // 2)), *marks]
        found.append({"sequences": [[*start, *tokens(rng.randint(64, 192))] for _ in range(answers)]})
    return found


def chatglm2(layers: int) -> PreTrainedModel:
    """ChatGLM2-6B in bfloat16: random weights of standard deviation 0.02, made on the GPU."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return _on_gpu(GlmForCausalLM, GlmConfig(num_hidden_layers=layers, rope_parameters=rope, **CHATGLM2))


def chatglm1(layers: int) -> PreTrainedModel:
    """ChatGLM-6B, likewise."""
    return _on_gpu(ChatGLMForCausalLM, ChatGLMConfig(num_layers=layers))


def _on_gpu(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)


def quantize(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Put the layers' linears into nf4, fp4 or int8, in place, as `load_model(quantization=…)` has them."""
    for name, linear in list(model.base_model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            model.base_model.layers.set_submodule(name, _quantized(linear, kind))
            linear.weight = None
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # what PEFT looks at
    gc.collect()
    torch.cuda.empty_cache()
    return model


def _quantized(linear: nn.Linear, kind: str) -> nn.Linear:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.data
    with torch.device("meta"):
        if kind == "int8":
            small = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        else:
            small = Linear4bit(*sizes, torch.bfloat16, compress_statistics=True, quant_type=kind)
    if kind == "int8":
        small.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).cuda()
    else:
        small.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type=kind).cuda()
    small.bias = linear.bias
    return small
