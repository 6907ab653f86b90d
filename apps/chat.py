"""A dialogue in the terminal, answers streamed as they are made."""

import sys

from transformers import TextStreamer

from glm.config import Data
from glm.data.encode import end_id, prompt_ids
from glm.generation.decode import decode
from glm.models import load_model, load_tokenizer


def talk(
    model_path: str, adapters: list[str], system: str, max_new_tokens: int, temperature: float, top_p: float
) -> None:
    """Read questions from standard input until `stop` or its end; `clear` forgets what was said.

    Old rounds are left out once a prompt would exceed 2,048 tokens.

    Raises:
        InputError: there is no such model or adapter.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_path, adapters=adapters, device=device)
    tokenizer = load_tokenizer(model_path)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    data = Data(max_source_length=2048, source_prefix=system)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    messages: list[dict[str, str]] = []
    print("clear: forget the dialogue; stop: end it")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "stop":
            return
        if question == "clear":
            messages.clear()
            continue
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        ids = torch.tensor([prompt_ids(tokenizer, messages, data)[0]], device=device)
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=end_id(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )[0, ids.shape[1] :]
        sys.stdout.flush()
        messages.append({"role": "assistant", "content": decode(tokenizer, answer.tolist())})
