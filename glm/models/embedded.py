"""The tiny base model of the embedded default: a sentencepiece tokenizer and a ChatGLM2-shaped causal LM, from scratch.

The model learns from plain text of the training split, so that SFT, reward model and PPO start from something that
knows the words but not the task.
"""

import io
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerBase

from glm.config import EmbeddedModel
from glm.errors import InputError
from glm.models.tokenization_chatglm2 import ChatGLM2Tokenizer

ROW = 128  # tokens of one training row: texts one after the other, cut where they fall
MULTIPLE = 64  # the vocabulary is padded up to a multiple, as the authors pad theirs


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> ChatGLM2Tokenizer:
    """Train sentencepiece BPE on `texts`, save it into `folder` in the tokenizer's own layout, and return it.

    Raises:
        InputError: the texts are too few for a vocabulary of this size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"model.embedded.vocab_size {vocab_size}: {str(error).splitlines()[-1]}") from None
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.model").write_bytes(model.getvalue())
        ChatGLM2Tokenizer(vocab_file=f"{scratch}/tokenizer.model").save_pretrained(folder)
    return ChatGLM2Tokenizer.from_pretrained(str(folder))


def new_model(params: EmbeddedModel, tokenizer: PreTrainedTokenizerBase) -> GlmForCausalLM:
    """A randomly initialised ChatGLM2 shape: grouped queries, half-rotated heads, biased q/k/v, RMSNorm, SwiGLU."""
    torch.manual_seed(params.seed)
    vocab_size = math.ceil(len(tokenizer) / MULTIPLE) * MULTIPLE
    config = GlmConfig(
        vocab_size=vocab_size,
        hidden_size=params.hidden_size,
        intermediate_size=params.ffn_hidden_size,
        num_hidden_layers=params.num_layers,
        num_attention_heads=params.num_attention_heads,
        num_key_value_heads=params.multi_query_group_num,
        head_dim=params.hidden_size // params.num_attention_heads,
        attention_bias=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GlmForCausalLM(config)


def pretrain(
    model: GlmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train_texts: list[str],
    dev_texts: list[str],
    params: EmbeddedModel,
    *,
    log: Callable[[int, dict[str, float]], None],
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Next-token training on `train_texts`, each followed by the end token; Muon with a warm-up and a cosine.

    Returns `loss` (nats a token on `dev_texts`), `steps`, `parameters`, `train_tokens` (of one epoch).
    """
    batch_size = max(1, params.tokens_per_batch // ROW)
    shuffle = random.Random(params.seed)
    encoded = [_with_end(tokenizer, text) for text in train_texts]
    tokens = sum(map(len, encoded))
    per_epoch = math.ceil(tokens / (batch_size * ROW))
    total = max(1, round(per_epoch * params.num_train_epochs))
    optimizers = _optimizers(model, params.learning_rate)
    warmup = min(50, total // 10 + 1)

    def factor(step: int) -> float:
        return min(1, (step + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / total)) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    step = 0
    while step < total:
        shuffle.shuffle(encoded)
        stream = torch.tensor([token for text in encoded for token in text])
        rows = stream[: len(stream) // ROW * ROW].view(-1, ROW)
        for batch in rows.split(batch_size):
            loss = model(input_ids=batch, labels=batch).loss
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            step += 1
            progress(step, total)
            if step % 20 == 0 or step == total:
                log(step, {"loss": loss.item(), "learning_rate": schedules[0].get_last_lr()[0]})
            if step == total:
                break
    model.eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "loss": text_loss(model, tokenizer, dev_texts),
        "steps": step,
        "parameters": parameters,
        "train_tokens": tokens,
    }


@torch.no_grad()
def text_loss(model: GlmForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Mean loss in nats a token of running text."""
    stream = torch.tensor([token for text in texts for token in _with_end(tokenizer, text)])
    rows = stream[: max(1, len(stream) // ROW) * ROW]
    rows = rows.view(-1, ROW) if len(rows) >= ROW else rows[None]
    losses = [(model(input_ids=batch, labels=batch).loss.item(), len(batch)) for batch in rows.split(32)]
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def _optimizers(model: GlmForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embeddings, head, norms and biases.

    On this little text it needs about half of AdamW's steps to the same loss; its updates are scaled to the size of
    AdamW's (Liu et al. 2025), so that one learning rate serves both.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1),
    ]


def _with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return [*ids, tokenizer.eos_token_id]
