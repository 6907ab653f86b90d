"""Batched decoding of prompts of different lengths."""

from contextlib import nullcontext

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.data.collate import pad_ids
from glm.data.encode import end_id
from glm.models.adapters import half_precision, mixed_dtypes


@torch.no_grad()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[list[int]]:
    """Answers to token-id prompts, in their order: ids after the prompt, with the end token where one was reached.

    Greedy by default. Sampling draws from torch's global generator; prompts are batched by length.
    """
    end = end_id(tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        if do_sample
        else {"do_sample": False}
    )
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_ids([prompts[index] for index in chosen], tokenizer.pad_token_id, "left")
        with half_precision(model) if mixed_dtypes(model) else nullcontext():
            out = model.generate(
                **{key: value.to(model.device) for key, value in batch.items()},
                **sampling,
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
            )
        for index, answer in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            answers[index] = answer[: answer.index(end) + 1] if end in answer else answer
    return answers


def decode(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> str:
    """An answer's text, without its end token."""
    return tokenizer.decode(
        [token for token in answer if token != tokenizer.eos_token_id], skip_special_tokens=True
    ).strip()
