"""Peak memory and speed of every method at batch 4 on a ChatGLM2-6B shape, after the reference's hardware table.

    python -m benchmarks.memory                    # two and a half minutes on one H100; nf4 rows need bitsandbytes
    python -m benchmarks.memory --only lora,nf4
    python -m benchmarks.memory --tiny             # does it run? on the CPU, with numbers that mean nothing

Random weights in bfloat16 (6.2 B parameters), LoRA r=8 on q, k and v, examples of the lengths of benchmarks/sft.py,
four to an optimizer step, decoder layers computed again in the backward pass, nothing compiled. The rows are
`glm.training.sft.train`, `glm.training.reward.train` and the parts of a PPO step, as the stages call them. The peak is
what torch allocated at most, the try of the four longest examples (up to 4,096 tokens) included; a ranking is two
answers. PPO: four prompts of 128 tokens, 128 new ones.
"""

import argparse
import gc
import logging
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from benchmarks import ppo as ppo_benchmark
from benchmarks import shapes
from benchmarks.sft import TOKENIZER
from glm.config import Ppo, Reward, Sft
from glm.models.quantization import PackedLinear, pack, row_scales
from glm.training import reward, sft

STEPS = 12
WINDOW = 4
LORA = {"lora_rank": 8, "lora_dropout": 0.1, "lora_target": ["query_key_value"]}  # the reference's defaults
BATCH: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "activation_checkpointing": "full",
    "torch_compile": False,
    "max_steps": STEPS,
    "logging_steps": WINDOW,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-4,
}
# name → (what, weights, values of section sft, what may be used at most in GB)
ROWS: dict[str, tuple[str, str, dict[str, Any], float | None]] = {
    "lora": ("LoRA r=8, bfloat16", "none", {}, 15.5),
    "nf4": ("LoRA r=8, nf4", "nf4", {}, 8.0),
    "cpm-int4": ("LoRA r=8, the authors' int4", "cpm-int4", {}, None),
    "p_tuning": ("P-Tuning v2 p=16, bfloat16", "none", {"method": "p_tuning", "pre_seq_len": 16}, 16.0),
    "p_tuning-nf4": ("P-Tuning v2 p=16, nf4", "nf4", {"method": "p_tuning", "pre_seq_len": 16}, None),
    "freeze": ("freeze l=3 (MLP), bfloat16", "none", {"method": "freeze", "num_layer_trainable": 3}, 24.0),
    "full": ("full, Adafactor, float32 weights", "none", {"method": "full", "optim": "adafactor"}, 78.0),
}


def small_model() -> PreTrainedModel:
    config = GlmConfig(
        vocab_size=65024, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, attention_bias=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return GlmForCausalLM(config).bfloat16()


def pack_in_place(model: PreTrainedModel, bits: int = 4) -> None:
    """Hold the layers' linears in the authors' format, as `load_model(quantization="cpm-int4")` does."""
    for name, linear in list(model.base_model.layers.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            small = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, bits)
            small.weight = torch.nn.Parameter(pack(linear.weight.data, bits), requires_grad=False)
            scale = row_scales(linear.weight.data, bits).to(linear.weight.dtype)
            small.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
            small.bias = linear.bias
            model.base_model.layers.set_submodule(name, small)


def build(weights: str, tiny: bool) -> PreTrainedModel:
    model = small_model() if tiny else shapes.chatglm2(28)
    if weights == "nf4" and not tiny:
        shapes.quantize(model, "nf4")
        model.is_quantized = True
    elif weights == "cpm-int4":
        pack_in_place(model)
        model.is_quantized = True
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def stage(kind: str, weights: str, values: dict[str, Any], tiny: bool) -> float:
    """Examples a second, the median of the windows after the first."""
    model = build(weights, tiny)
    speeds: list[float] = []
    options: dict[str, Any] = {
        "seed": 0, "log": lambda step, values: None, "progress": lambda done, total: None,
        "log_speed": lambda step, values: speeds.append(values["examples_per_second"]),
    }  # fmt: skip
    if kind == "sft":
        params = Sft.model_validate(LORA | BATCH | values)
        sft.train(model, TOKENIZER, shapes.examples(), [], params, **options)
    else:
        params = Reward.model_validate(BATCH | values)
        shape = Sft.model_validate(LORA)
        reward.train(model, TOKENIZER, shapes.pairs(), [], params, shape=shape, **options)
    return statistics.median(speeds)


def ppo_step(tiny: bool) -> float:
    """Examples a second of PPO steps with four prompts, LoRA actors."""
    model = build("none", tiny)
    actors = ppo_benchmark.make_actors(model, "query_key_value")
    params = Ppo(batch_size=4, mini_batch_size=4, max_new_tokens=16 if tiny else 128, ppo_epochs=1)
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 64000) for _ in range(16 if tiny else 128)] for _ in range(4)]
    optimizer = torch.optim.AdamW(actors.trained, lr=1e-5)
    seconds = [sum(ppo_benchmark.our_step(actors, prompts, params, optimizer)) for _ in range(4)]
    return 4 / statistics.median(seconds[1:])


def main() -> None:
    names = [*ROWS, "reward", "ppo"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(names), help=f"rows, by comma: {', '.join(names)}")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(format="  (%(message)s)")
    logging.getLogger("glm").setLevel(logging.INFO)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| row | weights and method, batch 4 | peak GB | bar | examples/s |\n| --- | --- | ---: | ---: | ---: |")

    def row(name: str, what: str, bar: float | None, measure: Callable[[], float]) -> None:
        if name not in options.only.split(","):
            return
        start = time.perf_counter()
        try:
            speed = f"{measure():.1f}"
        except Exception as error:  # one row that fails must not take the others with it
            speed = f"{type(error).__name__}: {str(error)[:300]}"
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        print(f"| {name} | {what} | {peak:.1f} | {bar or ''} | {speed} |", flush=True)
        print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
        gc.collect()

    for name, (what, weights, values, bar) in ROWS.items():
        row(name, what, bar, partial(stage, "sft", weights, values, options.tiny))
    row("reward", "reward model, LoRA r=8, bfloat16", 16.0, partial(stage, "reward", "none", {}, options.tiny))
    row("ppo", "PPO, LoRA r=8, bfloat16", 18.0, partial(ppo_step, options.tiny))


if __name__ == "__main__":
    main()
