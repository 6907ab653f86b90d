"""Tokenizer of GLM-4-9B's remote-code layout: a tiktoken vocabulary, run by the `tokenizers` library.

The authors' class reads `tokenizer.model` (a token in base64 and its rank on each line) with tiktoken; the special
tokens follow its last rank and stand in tokenizer_config.json. Here the ranks become merges (transformers'
TikTokenConverter), so that what is saved is an ordinary tokenizer.json.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from glm.errors import InputError
from glm.models.chat_templates import GLM4

_SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


class _Converter(TikTokenConverter):
    """TikTokenConverter without the tiktoken package."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return _read_ranks(Path(tiktoken_url))


def is_tiktoken(file: Path) -> bool:
    """Whether the file's first line is a token in base64 and its rank."""
    with open(file, "rb") as lines:
        fields = lines.readline(1000).split()
    try:
        return len(fields) == 2 and fields[1].isdigit() and bool(base64.b64decode(fields[0], validate=True))
    except binascii.Error:
        return False


def glm4_tokenizer(vocab_file: Path, tokenizer_config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GLM-4 folder, with sequences `[gMASK] <sop> A` and left padding.

    Raises:
        InputError: the file is no tiktoken vocabulary, or the configuration puts the special tokens elsewhere than
            after its last rank.
    """
    backend = _Converter(vocab_file=str(vocab_file)).converted()
    first = backend.get_vocab_size()
    added = tokenizer_config.get("added_tokens_decoder") or {
        str(first + i): {"content": token} for i, token in enumerate(_SPECIAL_TOKENS)
    }
    for token_id, token in sorted(added.items(), key=lambda item: int(item[0])):
        backend.add_special_tokens([AddedToken(token["content"], normalized=False, special=True)])
        if backend.token_to_id(token["content"]) != int(token_id):
            raise InputError(
                f"tokenizer_config.json: added_tokens_decoder puts {token['content']!r} at {token_id}, but "
                f"{vocab_file} has {first} tokens, so it is {backend.token_to_id(token['content'])}"
            )
    eos_token = tokenizer_config.get("eos_token", "<|endoftext|>")
    layout = [(token, backend.token_to_id(token)) for token in ("[gMASK]", "<sop>", eos_token)]
    if missing := [token for token, token_id in layout if token_id is None]:
        raise InputError(f"tokenizer_config.json: added_tokens_decoder lacks {', '.join(missing)}")
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair=f"[gMASK] <sop> $A $B {eos_token}", special_tokens=layout
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos_token,
        pad_token=tokenizer_config.get("pad_token", eos_token),
        padding_side="left",
        chat_template=GLM4,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=tokenizer_config.get("model_max_length"),
    )


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise InputError(f"{file}: line {number} is not a token in base64 and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{file}: the ranks must be 0 to {len(ranks) - 1}, each once")
    return ranks
