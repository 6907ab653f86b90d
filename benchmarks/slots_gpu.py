"""Does the serving engine decode as fast as the rollout decoder, and the same tokens as `generate`?

    python -m benchmarks.slots_gpu                       # a 6.2 B Glm on one GPU
    python -m benchmarks.slots_gpu --tiny --device cpu   # tries the script out

Random weights of ChatGLM2-6B's shape in bfloat16; 64 prompts of 128 tokens, 128 new tokens each, greedy. The bar: the
engine's slots make 80 % of the tokens a second of `glm.generation.rollout.Decoder`, which knows the batch beforehand.
"""

import argparse
import time
from types import SimpleNamespace

import torch

from benchmarks.ppo import build, synchronize
from glm.generation.rollout import Decoder
from glm.serving.sampling import SamplingParams, choose
from glm.serving.slots import Slots

BAR = 0.8


def greedy(slots: Slots, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], float]:
    """(answers, seconds of the tokens after the first) as the engine makes them, host transfers included."""
    wishes = [SamplingParams(new_tokens, temperature=0.0)] * len(prompts)
    draws = [0.0] * len(prompts)
    tokens = [one.token for one in choose(slots.admit(prompts), wishes, draws)]
    answers = [[token] for token in tokens]
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        tokens = [one.token for one in choose(slots.step(tokens), wishes, draws)]
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
    seconds = time.perf_counter() - started
    slots.clear()
    return answers, seconds


def rollout(decoder: Decoder, prompts: list[list[int]], new_tokens: int, device: str) -> float:
    """Seconds of the tokens after the first, by the rollout decoder; no token ends an answer."""
    tokenizer = SimpleNamespace(eos_token_id=-1, pad_token_id=0, name_or_path="random")

    def seconds(count: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        decoder.sample(prompts, tokenizer, max_new_tokens=count, batch_size=len(prompts))
        synchronize(device)
        return time.perf_counter() - started

    decoder.reserve(len(prompts), len(prompts[0]) + new_tokens, new_tokens)
    seconds(new_tokens)
    return seconds(new_tokens) - seconds(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    rows, length, new_tokens = (8, 16, 16) if options.tiny else (64, 128, 128)

    model = build(options.device, tiny=True).float().eval()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (6, 20), generator=draw).tolist()
    prompts = [prompt[: 5 + 3 * at] for at, prompt in enumerate(prompts)]
    slots = Slots(model, rows=8, columns=600)
    slots.warm_up()
    answers, _ = greedy(slots, prompts, 24)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=options.device)
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
        wanted.append(out[0, len(prompt) :].tolist())
    same = sum(answer == want for answer, want in zip(answers, wanted, strict=True))
    print(f"float32: {same} of {len(prompts)} answers as those of generate", flush=True)

    model = build(options.device, tiny=options.tiny).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (rows, length), generator=draw).tolist()
    made = rows * (new_tokens - 1)
    decoder = made / rollout(Decoder(model), prompts, new_tokens, options.device)
    print(f"rollout decoder, {rows} rows: {decoder:.0f} tokens/s", flush=True)
    started = time.perf_counter()
    slots = Slots(model, rows=rows, columns=min(2048, 32 * length))
    slots.warm_up()
    print(f"slots: warm after {time.perf_counter() - started:.0f} s, {len(slots.graphs)} graphs", flush=True)
    greedy(slots, prompts, 8)
    served = made / greedy(slots, prompts, new_tokens)[1]
    print(f"slots, {rows} rows: {served:.0f} tokens/s, {served / decoder:.2f} of it (bar {BAR})", flush=True)


if __name__ == "__main__":
    main()
