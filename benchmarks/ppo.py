"""How fast is one PPO step, and where does the time go?

    python -m benchmarks.ppo                       # a 6.2 B Glm on one H100, under four minutes
    python -m benchmarks.ppo --vary                # prompts of different lengths, so that there is padding to save
    python -m benchmarks.ppo --tiny --device cpu   # tries the script out

A Glm of ChatGLM2-6B's shape with random bfloat16 weights made on the device; a rank-8 LoRA each for policy, reference
and reward on `--target`; 64 prompts of 128 tokens, 128 new tokens each, one epoch, one optimizer step. The same step is
timed as this project takes it and as the reference implementation would: plain `generate`, adapters switched, three
forward passes for policy, reference and reward, eager kernels. Both compute log-probabilities on answers only.

generate: prompts in, tokens with log-probabilities and values out. score: what the update needs besides (reference and
reward; for the reference style the policy too), and advantages. update: forward, backward, AdamW. Decoding alone is the
time of 127 further tokens after the first. Limits are those of an H100 SXM: 3.35 TB/s, 989 TFLOP/s in bfloat16; a step
of decoding reads every weight but the embedding once and on average the mean filling of the cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import GlmConfig, GlmForCausalLM

from glm.config import Ppo, Sft
from glm.generation.decode import generate
from glm.generation.rollout import Samples
from glm.models.adapters import add_lora, save_lora, save_score
from glm.training import ppo
from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.ppo_terms import ScoreScale

BANDWIDTH, FLOPS = 3.35e12, 989e12
TOKENIZER = SimpleNamespace(eos_token_id=2, pad_token_id=0, name_or_path="random")


def build(device: str, tiny: bool) -> GlmForCausalLM:
    shape = (
        {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "head_dim": 16}
        if tiny
        else {"num_hidden_layers": 28, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 13696}
    )
    config = GlmConfig(
        vocab_size=1024 if tiny else 65024,
        num_key_value_heads=2,
        attention_bias=True,
        rms_norm_eps=1e-5,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        **shape,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = GlmForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def make_actors(model: GlmForCausalLM, target: str) -> Actors:
    """Actors with three random LoRAs of rank 8."""
    lora = Sft(lora_rank=8, lora_dropout=0.0, lora_target=target if target == "all-linear" else [target])
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in ("sft", "reward")}
        for folder in folders.values():
            folder.mkdir()
            adapted = add_lora(model, lora)
            for name, parameter in adapted.named_parameters():
                if ".lora_B." in name:
                    nn.init.normal_(parameter, std=1e-3)
            save_lora(adapted, folder, "random")
            model = adapted.unload()
        save_score(folders["reward"], nn.Linear(model.config.hidden_size, 1, bias=False))
        return Actors(model, policy=folders["sft"], reference=folders["sft"], reward=folders["reward"])


def timed(device: str, run: Callable[[], object]) -> tuple[object, float]:
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def our_step(actors: Actors, prompts: list[list[int]], params: Ppo, optimizer: torch.optim.Optimizer) -> list[float]:
    """Seconds of generate, score and update."""
    device = actors.model.device.type
    samples, generating = timed(device, lambda: actors.sample(prompts, TOKENIZER, params))
    experience, scoring = timed(
        device, lambda: ppo.assess(actors, TOKENIZER, prompts, samples, params, params.kl_coef, ScoreScale())
    )
    _, updating = timed(device, lambda: ppo.update(actors, optimizer, experience, params, step=1))
    return [generating, scoring, updating]


@contextmanager
def reference_style(actors: Actors) -> Iterator[None]:
    """Inside, forward passes are eager and padded, each layer as transformers and PEFT compute it."""
    ours = actors.packed, actors.joint, actors.run_layer
    actors.packed, actors.joint, actors.run_layer = False, None, None
    with torch.compiler.set_stance("force_eager"):
        yield
    actors.packed, actors.joint, actors.run_layer = ours


def reference_step(
    actors: Actors, prompts: list[list[int]], params: Ppo, optimizer: torch.optim.Optimizer
) -> list[float]:
    """The same three without the decoder: the policy's log-probabilities cost a forward pass of their own."""
    device = actors.model.device.type
    settings = {"max_new_tokens": params.max_new_tokens, "batch_size": len(prompts), "do_sample": True}
    answers, generating = timed(device, lambda: generate(actors.model, TOKENIZER, prompts, **settings))

    @torch.no_grad()
    def score() -> ppo.Experience:
        batch = batch_of(prompts, answers, actors.model.device)
        found = [actors("policy", part, 1.0) for part in actors.parts(batch)]
        samples = Samples(answers, *(torch.cat([one[at] for one in found]) for at in (0, 1)))
        return ppo.assess(actors, TOKENIZER, prompts, samples, params, params.kl_coef, ScoreScale())

    experience, scoring = timed(device, score)
    _, updating = timed(device, lambda: ppo.update(actors, optimizer, experience, params, step=1))
    return [generating, scoring, updating]


def decode_rate(actors: Actors, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """(tokens a second after the first token, seconds until the first), medians of three."""
    device, decoder = actors.model.device.type, actors.sampler.decoder

    def seconds(count: int) -> float:
        assert decoder is not None
        settings = {"max_new_tokens": count, "batch_size": len(prompts), "do_sample": True}
        run = lambda: decoder.sample(prompts, TOKENIZER, **settings)  # noqa: E731
        return sorted(timed(device, run)[1] for _ in range(3))[1]

    seconds(new_tokens)
    first = seconds(1)
    return len(prompts) * (new_tokens - 1) / (seconds(new_tokens) - first), first


def rounding(actors: Actors, prompts: list[list[int]], params: Ppo) -> tuple[float, float]:
    """Mean errors of bfloat16 log-probabilities against float32: the rollout's, and the training forward's."""
    rows = 8
    samples = actors.sample(prompts, TOKENIZER, params)
    batch = batch_of(prompts[:rows], samples.answers[:rows], actors.model.device)
    forward = actors.logprobs("policy", batch, 1.0)
    actors.model.float()
    with reference_style(actors):
        exact = actors.logprobs("policy", batch, 1.0)
    found = samples.logprobs[:rows, : exact.shape[1]]
    return ((found - exact).abs().sum() / batch.mask.sum()).item(), (
        (forward - exact).abs().sum() / batch.mask.sum()
    ).item()


def decode_limit(model: GlmForCausalLM, rows: int, prompt: int, new_tokens: int) -> float:
    """Tokens a second if nothing but reading weights and cache took time."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (prompt + new_tokens / 2)
    return rows * BANDWIDTH / (2 * (weights + rows * cache))


def step_limit(model: GlmForCausalLM, rows: int, prompt: int, new_tokens: int) -> float:
    """Examples a second at the limits: decoding by bandwidth, the rest by FLOPs (head and attention left out)."""
    config = model.config
    blocks = sum(p.numel() for p in model.parameters()) - 2 * config.vocab_size * config.hidden_size
    tokens = rows * (prompt + new_tokens)
    # prompts once for the rollout; reference and reward forward; update forward and backward without weight gradients
    flops = 2 * blocks * (rows * prompt + tokens * 2 + tokens * 2)
    return rows / (flops / FLOPS + rows * new_tokens / decode_limit(model, rows, prompt, new_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--target", default="query_key_value", help="or all-linear: the modules that have a LoRA")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt, and of an answer")
    parser.add_argument("--vary", action="store_true", help="prompts of a fourth to seven fourths of that length")
    parser.add_argument("--parts", type=int, default=12, help="gradient_accumulation_steps")
    options = parser.parse_args()
    rows, length, device = options.rows, options.length, options.device
    model = build(device, options.tiny)
    actors = make_actors(model, options.target)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(100, model.config.vocab_size, (2 * rows, 2 * length), generator=draw).tolist()
    lengths = [length] * len(prompts)
    if options.vary:
        lengths = torch.linspace(length // 4, 7 * length // 4, 2 * rows)[torch.randperm(2 * rows, generator=draw)].int()
    prompts = [prompt[:size] for prompt, size in zip(prompts, lengths, strict=True)]
    params = Ppo(
        batch_size=rows,
        mini_batch_size=rows,
        gradient_accumulation_steps=min(options.parts, rows),
        ppo_epochs=1,
        max_new_tokens=length,
    )
    optimizer = torch.optim.AdamW(actors.trained, lr=1e-5)
    steps = Table(
        "step", "generate s", "score s", "update s", "total s", "examples/s", "of the limit", "peak GB", "reserved GB"
    )
    limit = step_limit(model, rows, length, length)
    for name, step, style in (
        ("this project", our_step, nullcontext()),
        ("reference style", reference_step, reference_style(actors)),
    ):
        with style:
            start = time.perf_counter()
            step(actors, prompts[:rows], params, optimizer)
            print(f"{name}: first step {time.perf_counter() - start:.1f} s (compiles)", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            runs = sorted((step(actors, prompts[:rows], params, optimizer) for _ in range(3)), key=sum)
        peaks = [float("nan")] * 2
        if device == "cuda":
            peaks = [torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9]
        total = sum(runs[1])
        cells = [*runs[1], total, rows / total]
        steps.add_row(
            name, *(f"{cell:.2f}" for cell in cells), f"{rows / total / limit:.0%}", *(f"{gb:.1f}" for gb in peaks)
        )
        print(name, [f"{cell:.3f}" for cell in cells], [f"{gb:.1f} GB" for gb in peaks], flush=True)
    decoding = Table("decode, rows", "tokens/s", "of the limit", "first token s")
    for count in (rows, 2 * rows):
        rate, first = decode_rate(actors, prompts[:count], length)
        share = rate / decode_limit(model, count, length, length)
        decoding.add_row(str(count), f"{rate:,.0f}", f"{share:.0%}", f"{first:.2f}")
        print(f"decode {count}: {rate:.0f} tokens/s", flush=True)
    rollout_error, forward_error = rounding(actors, prompts[:rows], params)
    console = Console(width=120)
    where = torch.cuda.get_device_name() if device == "cuda" else device
    size = f"{rows} x ({'about ' if options.vary else ''}{length} + {length})"
    console.print(f"{where}, torch {torch.__version__}, LoRA r=8 on {options.target}, {size}")
    console.print(steps, decoding)
    console.print(
        f"mean error of the answers' log-probabilities against float32: rollout {rollout_error:.4f}, "
        f"training forward {forward_error:.4f}"
    )


if __name__ == "__main__":
    main()
