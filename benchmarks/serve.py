"""The server under load, against answering one request at a time with `generate`, in one run.

    python -m benchmarks.serve models/sft                    32 clients; the bar is 6 times the loop's tokens a second
    python -m benchmarks.serve models/sft --soak 120         and 64 clients for two minutes without an error
    python -m benchmarks.serve models/sft --continuous       and transformers' continuous batching on the same prompts

Clients run in this process, the server in one of its own. Tokens are those of the answers (`usage`).
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx
import torch

from apps.models import resolve
from flows.server import free_port
from glm.data.encode import end_id
from glm.models.chat_encoding import encode_messages

BAR = 6.0
THINGS = ("酒店", "书籍", "电脑")
OPENINGS = ("房间", "也许", "这本书", "屏幕", "服务", "第一次", "价格", "老板")


def questions(count: int) -> list[str]:
    """Requests like those of the embedded default's training data."""
    draw = random.Random(0)
    return [f"写一条{draw.choice(THINGS)}评论，以“{draw.choice(OPENINGS)}”开头。" for _ in range(count)]


@torch.no_grad()
def one_at_a_time(model: Any, tokenizer: Any, prompts: list[list[int]], max_tokens: int) -> tuple[int, float]:
    """(tokens, seconds) of a loop around `generate`."""
    tokens, started = 0, time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=end_id(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens += out.shape[1] - len(prompt)
    return tokens, time.perf_counter() - started


def continuous(model: Any, tokenizer: Any, prompts: list[list[int]], max_tokens: int) -> tuple[int, float]:
    """(tokens, seconds) of transformers' continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=end_id(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    started = time.perf_counter()
    results = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    return sum(len(result.generated_tokens) for result in results.values()), time.perf_counter() - started


async def clients(
    url: str, name: str, count: int, texts: list[str], max_tokens: int, seconds: float | None = None
) -> tuple[int, float, Counter[str], list[float]]:
    """(tokens, seconds, outcomes, latencies) of `count` clients that ask all `texts` once, or go on for `seconds`."""
    waiting, outcomes, latencies = list(texts), Counter[str](), list[float]()
    tokens, started = 0, time.perf_counter()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        nonlocal tokens
        draw = random.Random(number)
        while (time.perf_counter() - started < seconds) if seconds else waiting:
            text = draw.choice(texts) if seconds else waiting.pop()
            body = {
                "model": name,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": max_tokens,
                "temperature": 0 if not seconds else draw.choice([0, 0.9]),
                "stream": bool(seconds) and draw.random() < 0.5,
            }
            asked = time.perf_counter()
            try:
                response = await http.post(f"{url}/v1/chat/completions", json=body)
                whole = response.text.endswith("[DONE]\n\n") if body["stream"] else bool(response.json()["choices"])
                outcomes["ok" if response.status_code == 200 and whole else f"status {response.status_code}"] += 1
                if not body["stream"] and response.status_code == 200:
                    tokens += response.json()["usage"]["completion_tokens"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                outcomes[type(error).__name__] += 1
            latencies.append(time.perf_counter() - asked)

    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        await asyncio.gather(*[client(number, http) for number in range(count)])
    return tokens, time.perf_counter() - started, outcomes, sorted(latencies)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/export")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--alone", type=int, default=24, help="requests of the one-at-a-time loop")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "apps.cli", "serve", arguments.model, "--name", "m", "--port", str(port)]
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    server = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        model, tokenizer = resolve(arguments.model).load(dtype=arguments.dtype)
        texts = questions(arguments.requests)
        prompts = [
            encode_messages(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).input_ids
            for text in texts
        ]
        wait_until_up(url, server)
        asyncio.run(clients(url, "m", 4, texts[:8], arguments.max_tokens))  # warm
        one_at_a_time(model, tokenizer, prompts[:2], arguments.max_tokens)

        alone, seconds = one_at_a_time(model, tokenizer, prompts[: arguments.alone], arguments.max_tokens)
        loop = alone / seconds
        print(f"one at a time, generate: {loop:.0f} tokens/s ({arguments.alone} requests)", flush=True)
        if arguments.continuous:
            made, seconds = continuous(model, tokenizer, prompts[: arguments.clients], arguments.max_tokens)
            print(f"transformers' continuous batching: {made / seconds:.0f} tokens/s", flush=True)
        made, seconds, outcomes, waits = asyncio.run(clients(url, "m", arguments.clients, texts, arguments.max_tokens))
        ratio = made / seconds / loop
        print(
            f"server, {arguments.clients} clients: {made / seconds:.0f} tokens/s, "
            f"{len(texts) / seconds:.1f} requests/s, median {waits[len(waits) // 2]:.2f} s, {dict(outcomes)}: "
            f"{ratio:.1f} times (bar {BAR:g})",
            flush=True,
        )
        failed = ratio < BAR or set(outcomes) != {"ok"}
        if arguments.soak:
            *_, outcomes, waits = asyncio.run(clients(url, "m", 64, texts, arguments.max_tokens, arguments.soak))
            print(f"server, 64 clients, {arguments.soak:.0f} s: {dict(outcomes)}, longest {waits[-1]:.1f} s")
            failed |= set(outcomes) != {"ok"}
        return int(failed)
    finally:
        server.terminate()
        server.wait()


def wait_until_up(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Return once the server answers; RuntimeError if it ends before."""
    while server.poll() is None:
        try:
            httpx.get(f"{url}/healthz")
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


if __name__ == "__main__":
    sys.exit(main())
