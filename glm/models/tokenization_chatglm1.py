"""Tokenizer of ChatGLM-6B: sentencepiece unigram with its own marks for newlines, tabs and runs of blanks.

Sequences end with `[gMASK] <sop>`; in a pair the answer follows with `<eop>` (reference: tokenization_chatglm.py of
THUDM/chatglm-6b, 2023-09-04).
"""

import re
from typing import Any

from transformers import AddedToken, PythonBackend

from glm.errors import InputError
from glm.models.chat_templates import CHATGLM1, CHATGLM1_NUMBERED
from glm.models.tokenization_base import SentencePieceChatTokenizer

_MAX_BLANKS = 80
_BLANKS = re.compile(f" {{2,{_MAX_BLANKS}}}")
_BLANKS_TOKEN = re.compile(r"<\|blank_(\d+)\|>")
_IMAGE_TOKEN = re.compile(r"<image_(\d+)>")


class ChatGLM1Tokenizer(SentencePieceChatTokenizer):
    """ChatGLM-6B's tokenizer.

    Called on a text that spells `<sop>`, `<eop>`, `[MASK]`, `<unk>` or `<pad>`, it makes them special tokens and drops
    the blanks around, as the authors' does; `split_special_tokens=True` keeps such text as text.

    Args:
        num_image_tokens: size of the image vocabulary before the text pieces: 20000 in the first checkpoints (150528
            embedding rows), 0 since.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012
    chat_templates = {"chatglm1": CHATGLM1, "chatglm2": CHATGLM1_NUMBERED}  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        for name in ("do_lower_case", "remove_space"):
            if kwargs.pop(name, False):
                raise InputError(f"tokenizer_config.json: {name}=true is not supported; no published ChatGLM-6B has it")
        self.num_image_tokens = num_image_tokens
        # from_pretrained hands the tokens that transformers has no name for over in this dict.
        own = kwargs.pop("model_specific_special_tokens", {})
        super().__init__(
            vocab_file=vocab_file,
            bos_token=_stripping(bos_token),
            eos_token=_stripping(eos_token),
            mask_token=_stripping(mask_token),
            pad_token=_stripping(pad_token),
            unk_token=_stripping(unk_token),
            model_specific_special_tokens={"end_token": end_token, "gmask_token": gmask_token, **own},
            num_image_tokens=num_image_tokens,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of image tokens and text pieces (the embedding may have more rows)."""
        return self.num_image_tokens + self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)} | self._added_tokens_encoder

    def recognised_tokens(self) -> set[str]:
        """The tokens that the authors' code finds in a text, and those that were added by the user."""
        return set(self._added_tokens_encoder) - {self.gmask_token, self.end_token}

    def control_tokens(self) -> dict[str, int]:
        """All special tokens."""
        return dict(self._added_tokens_encoder)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`A [gMASK] <sop>`, or `A [gMASK] <sop> B <eop>` for a pair."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` as plain text, whatever it spells, without special tokens."""
        return self.convert_tokens_to_ids(self._tokenize(text))

    def encode_text_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Not possible: the normalisation moves characters. In ChatGLM-6B's layout an answer stands on its own."""
        raise InputError("the chat template puts an answer beside other text; ChatGLM-6B cannot learn a part of one")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of `tokens` with newlines, tabs and blanks restored; control tokens give nothing."""
        text = self.sp_model.DecodePieces([token for token in tokens if token != self.pad_token])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return _BLANKS_TOKEN.sub(lambda found: " " * int(found[1]), text)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return super()._tokenize(_BLANKS.sub(lambda found: f"<|blank_{len(found[0])}|>", text))

    def _convert_token_to_id(self, token: str) -> int:
        if found := _IMAGE_TOKEN.fullmatch(token):
            return int(found[1])
        return self.num_image_tokens + self.sp_model.PieceToId(token)

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < self.num_image_tokens:
            return f"<image_{index}>"
        # Rows of the embedding beyond the vocabulary decode to nothing.
        return self.sp_model.IdToPiece(index - self.num_image_tokens) if 0 <= index < self.vocab_size else ""

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        # The sentencepiece class takes a piece's number for its id; the general one asks `get_vocab`.
        return PythonBackend._add_tokens(self, new_tokens, special_tokens)


def _stripping(token: str | AddedToken) -> AddedToken:
    return AddedToken(str(token), lstrip=True, rstrip=True, normalized=False, special=True)
