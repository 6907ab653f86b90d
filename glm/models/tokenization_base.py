"""What the sentencepiece tokenizers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B have in common."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from glm.errors import InputError
from glm.models.chat_encoding import encode_messages, refuse_surrogates


class SentencePieceChatTokenizer(SentencePieceBackend):
    """A sentencepiece model with ChatGLM's special tokens, left padding and chat encoding.

    Which spellings in a text become special tokens when the tokenizer is called follows the authors' code
    (`recognised_tokens`); with `split_special_tokens=True` none does, and none ever does in a chat message.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (transformers' convention)
    padding_side = "left"
    chat_templates: dict[str, str] = {}  # noqa: RUF012
    """Prompt formats by name; the first one is the authors'."""

    def __init__(self, vocab_file: str, chat_template: str | None = None, **kwargs: Any) -> None:
        # auto_map names remote code, which is never used; it must not be saved with our files either.
        kwargs.pop("auto_map", None)
        if chat_template is None:
            chat_template = next(iter(self.chat_templates.values()))
        try:
            super().__init__(vocab_file=vocab_file, chat_template=chat_template, **kwargs)
        except RuntimeError as error:
            raise InputError(f"{vocab_file}: not a sentencepiece model ({error})") from error

    def recognised_tokens(self) -> set[str]:
        """Spellings that become special tokens when the tokenizer is called on text that holds them."""
        raise NotImplementedError

    def control_tokens(self) -> dict[str, int]:
        """Spellings that a chat template may write as control tokens, with their ids."""
        raise NotImplementedError

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        # Called whenever tokens were added. A pattern does what transformers' trie does: leftmost, longest first.
        spellings = sorted({*self.recognised_tokens(), *(unique_no_split_tokens or [])}, key=len, reverse=True)
        self._recognised = re.compile(f"({'|'.join(map(re.escape, spellings))})") if spellings else None

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces of `text`; recognised special tokens stay whole unless `split_special_tokens`."""
        if kwargs.get("split_special_tokens", self.split_special_tokens) or self._recognised is None:
            return self._tokenize(text)
        parts = self._recognised.split(text)  # text, token, text, token, ..., text
        for i in range(1, len(parts), 2):
            added = self._added_tokens_decoder[self._added_tokens_encoder[parts[i]]]
            if added.lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
            if added.rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
        pieces: list[str] = []
        for i, part in enumerate(parts):
            pieces += [part] if i % 2 else self._tokenize(part)
        return pieces

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        refuse_surrogates(text)
        return self.sp_model.encode(text, out_type=str)

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` as plain text, whatever it spells, without special tokens."""
        refuse_surrogates(text)
        return self.sp_model.encode(text)

    def encode_text_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same with each id's span in the text's characters."""
        refuse_surrogates(text)
        character_at = [i for i, character in enumerate(text) for _ in character.encode()] + [len(text)]
        pieces = self.sp_model.encode(text, return_type="proto").pieces
        spans = [(character_at[piece.begin], character_at[piece.end]) for piece in pieces]
        return [piece.id for piece in pieces], spans

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token of the sequence that `build_inputs_with_special_tokens` makes, else 0."""
        ids = token_ids_0
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special = set(self.all_special_ids)
        return [int(token_id in special) for token_id in ids]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' method, with messages that cannot inject control tokens and with answer masks.

        `return_assistant_tokens_mask` adds `assistant_masks`: 1 on the tokens that are an answer to learn.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
        kwargs.pop("sanitize_control_tokens", None)  # always done
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        chats = [
            encode_messages(
                self,
                messages,
                chat_template=chat_template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
            for messages in (conversation if batched else [conversation])
        ]
        limit = (max_length or self.model_max_length) if truncation else None
        kept = slice(-limit, None) if limit and self.truncation_side == "left" else slice(limit)
        batch = self.pad(
            {"input_ids": [chat.input_ids[kept] for chat in chats]},
            padding=padding,
            max_length=max_length,
            return_attention_mask=True,
        )
        if return_assistant_tokens_mask:
            masks = [chat.assistant_mask[kept] for chat in chats]
            fill = [[0] * (len(ids) - len(mask)) for ids, mask in zip(batch["input_ids"], masks, strict=True)]
            batch["assistant_masks"] = [
                zeros + mask if self.padding_side == "left" else mask + zeros
                for zeros, mask in zip(fill, masks, strict=True)
            ]
        data = dict(batch)
        if not batched and return_tensors is None:
            data = {name: rows[0] for name, rows in data.items()}
        encoding = BatchEncoding(data, tensor_type=return_tensors)
        return encoding if return_dict else encoding["input_ids"]
