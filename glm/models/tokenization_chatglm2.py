"""Tokenizers of ChatGLM2-6B and ChatGLM3-6B: sentencepiece BPE, then the special tokens in a fixed order.

The authors' own code recognises no special token in a text; sequences start with `[gMASK] <sop>`, a pair ends with the
end token (reference: tokenization_chatglm.py of THUDM/chatglm2-6b and chatglm3-6b). Their `sop` and `eop` are spelled
`<sop>` and `<eop>` here, as in ChatGLM-6B and GLM-4: as bare letters they are parts of words ("philosophy", "people").
"""

from pathlib import Path
from typing import Any

from transformers import AddedToken

from glm.errors import InputError
from glm.files import write_text
from glm.models.chat_templates import CHATGLM2, CHATGLM3
from glm.models.tokenization_base import SentencePieceChatTokenizer

_PROBE = " a  b\n\tＡ\u1abc "  # blanks, control characters, a full-width letter, a character that no vocabulary has
_AUTHORS_NAMES = {"sop": "<sop>", "eop": "<eop>"}
_ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class ChatGLM2Tokenizer(SentencePieceChatTokenizer):
    """ChatGLM2-6B's tokenizer; its special tokens get the ids after the last sentencepiece piece.

    The sentencepiece model must add a blank before a text (the default of sentencepiece's trainer), as the authors'
    does: a prompt and its answer are encoded apart, and the chat template counts on it.
    """

    own_tokens: tuple[str, ...] = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
    chat_templates = {"chatglm2": CHATGLM2}  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        eos_token: str = "</s>",
        pad_token: str = "<unk>",
        unk_token: str = "<unk>",
        extra_special_tokens: list[str] | None = None,
        encode_special_tokens: bool = False,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> None:
        self.encode_special_tokens = encode_special_tokens
        # Configurations that list the added tokens (the authors' later ones do) have them under the authors' names.
        for token_id, token in (kwargs.get("added_tokens_decoder") or {}).items():
            if token.content in _AUTHORS_NAMES:
                kwargs["added_tokens_decoder"][token_id] = AddedToken(
                    _AUTHORS_NAMES[token.content], normalized=False, special=True
                )
        added = [token for token in extra_special_tokens or [] if str(token) not in (*self.own_tokens, *_AUTHORS_NAMES)]
        super().__init__(
            vocab_file=vocab_file,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            extra_special_tokens=[*self.own_tokens, *added],
            encode_special_tokens=encode_special_tokens,
            padding_side=padding_side,  # passed on to be saved: transformers' own default is the right
            **kwargs,
        )
        first = self.sp_model.get_piece_size()
        ids = self._added_tokens_encoder
        own_ids = [ids[token] for token in self.own_tokens]
        if own_ids != list(range(first, self.vocab_size)) or len(set(ids.values())) < len(ids):
            raise InputError(
                f"tokenizer_config.json: added_tokens_decoder must give the ids from {first} to "
                f"{', '.join(self.own_tokens)}, in this order"
            )
        if not self.sp_model.encode("a", out_type=str)[0].startswith("▁"):
            raise InputError(f"{vocab_file}: the sentencepiece model must be trained with add_dummy_prefix=true")
        if self.sp_model.decode(self.sp_model.encode(_PROBE)) != _PROBE:
            raise InputError(
                f"{vocab_file}: the sentencepiece model changes texts; train it with normalization_rule_name=identity, "
                "remove_extra_whitespaces=false, byte_fallback=true"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces and special tokens (the embedding may have more rows)."""
        return self.sp_model.get_piece_size() + len(self.own_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, the added ones included."""
        pieces = {self.sp_model.IdToPiece(i): i for i in range(self.sp_model.get_piece_size())}
        return pieces | self._added_tokens_encoder

    def recognised_tokens(self) -> set[str]:
        """Only tokens that were added by the user; with `encode_special_tokens` the role tokens too."""
        own = {*self.own_tokens, self.eos_token, self.pad_token, self.unk_token}
        return {token for token in self._added_tokens_encoder if token not in own} | (
            set(self.own_tokens) & set(_ROLE_TOKENS) if self.encode_special_tokens else set()
        )

    def control_tokens(self) -> dict[str, int]:
        """All special tokens."""
        return dict(self._added_tokens_encoder)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] <sop> A`, or `[gMASK] <sop> A B </s>` for a pair."""
        prefix = self.convert_tokens_to_ids(["[gMASK]", "<sop>"])
        return prefix + token_ids_0 + ([] if token_ids_1 is None else [*token_ids_1, self.eos_token_id])

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        special = set(self.all_special_tokens)
        # Not normalised: tokenizer.json would look for a normalised token with a word mark before it.
        tokens = [
            AddedToken(str(token), normalized=False, special=special_tokens or str(token) in special)
            for token in new_tokens
            if str(token) not in self._added_tokens_encoder
        ]
        own = [token for token in tokens if token.content in self.own_tokens]
        if own:
            first = self.sp_model.get_piece_size()
            self.added_tokens_decoder = {first + self.own_tokens.index(token.content): token for token in own}
        return len(own) + super()._add_tokens([token for token in tokens if token not in own], special_tokens)

    def _convert_id_to_token(self, index: int) -> str:
        # Rows of the embedding beyond the vocabulary (padding to a round number) decode to nothing.
        return self.sp_model.IdToPiece(index) if 0 <= index < self.sp_model.get_piece_size() else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of `tokens`; special tokens give nothing."""
        silent = set(self.all_special_tokens)
        return self.sp_model.DecodePieces([token for token in tokens if token not in silent])

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Save the sentencepiece model with its configuration, and a tokenizer.json of the same ids.

        Where this project is not at hand, AutoTokenizer takes the tokenizer.json; without it, it would make a tokenizer
        of other ids from tokenizer.model, and say nothing.
        """
        from glm.models.fast_tokenizer import to_fast

        fast = to_fast(self)
        saved = super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / "tokenizer.json"
        write_text(file, fast.backend_tokenizer.to_str(pretty=True))
        return (*saved, str(file))


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """ChatGLM3-6B's tokenizer: ChatGLM2-6B's file with role tokens.

    `encode_special_tokens=True` turns role tokens spelled in a text into ids, as the authors' option of that name does;
    use it only on text that you wrote yourself.
    """

    own_tokens = (*ChatGLM2Tokenizer.own_tokens, *_ROLE_TOKENS)
    chat_templates = {"chatglm3": CHATGLM3}  # noqa: RUF012

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of `tokens`; the special tokens beyond the sentencepiece model appear by the authors' names."""
        silent = set(self.all_special_tokens) - set(self.own_tokens)
        names = {ours: theirs for theirs, ours in _AUTHORS_NAMES.items()}
        return self.sp_model.DecodePieces([names.get(token, token) for token in tokens if token not in silent])
