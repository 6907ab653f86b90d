"""A fast tokenizer with the ids of a ChatGLM2/3 tokenizer, so that an exported model needs nothing of this project.

A folder with the saved result loads with plain `AutoTokenizer.from_pretrained`.
"""

from collections.abc import Iterable, Sequence

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from glm.errors import InputError
from glm.models.tokenization_chatglm2 import ChatGLM2Tokenizer


def to_fast(tokenizer: ChatGLM2Tokenizer, texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Convert, and compare the ids of both on `texts` and on texts made from the whole vocabulary.

    The result has the same ids, sequence layout (`[gMASK] <sop> A`), chat template and left padding. One thing differs:
    a fast tokenizer finds its special tokens in any text, so that a call needs `split_special_tokens=True`, and a chat
    `sanitize_control_tokens=True`, to keep spelled tokens text.

    Raises:
        InputError: the tokenizer is no ChatGLM2/3 tokenizer, or a text gets other ids.
    """
    if not isinstance(tokenizer, ChatGLM2Tokenizer):
        raise InputError(f"to_fast: no fast form of {type(tokenizer).__name__}; ChatGLM2 and ChatGLM3 have one")
    pieces = tokenizer.sp_model
    backend = Tokenizer(
        models.BPE(
            vocab={pieces.IdToPiece(i): i for i in range(pieces.get_piece_size())},
            merges=_merges(pieces),
            unk_token=tokenizer.unk_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = tokenizer.get_added_vocab()
    # In the order of their ids, which is how the library numbers those that are no pieces.
    backend.add_tokens(
        [
            AddedToken(token.content, normalized=False, special=token.special)
            for token in tokenizer.added_tokens_decoder.values()
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair=f"[gMASK] <sop> $A $B {tokenizer.eos_token}",
        special_tokens=[(token, special[token]) for token in ("[gMASK]", "<sop>", tokenizer.eos_token)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        extra_special_tokens=[
            token for token in tokenizer.all_special_tokens if token not in tokenizer.special_tokens_map.values()
        ],
        padding_side="left",
        model_input_names=list(tokenizer.model_input_names),
        chat_template=tokenizer.chat_template,
    )
    if special != fast.get_added_vocab():
        raise InputError("to_fast: the special tokens got other ids")
    _compare(tokenizer, fast, [*_probes(pieces), *texts])
    return fast


def _merges(pieces: SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first: what sentencepiece's BPE looks for.

    Control, byte and unknown pieces are left out: sentencepiece never makes them from text that spells them.
    """
    plain = {
        pieces.IdToPiece(i): pieces.GetScore(i)
        for i in range(pieces.get_piece_size())
        if not (pieces.IsControl(i) or pieces.IsByte(i) or pieces.IsUnknown(i))
    }
    rank = {piece: i for i, piece in enumerate(plain)}
    found = [
        (-score, rank[piece[:cut]], rank[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in plain.items()
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _probes(pieces: SentencePieceProcessor) -> Iterable[str]:
    """Texts in which every piece occurs beside others, and runs, blanks and spellings that are easy to get wrong."""
    words = [pieces.IdToPiece(i).replace("▁", " ") for i in range(pieces.get_piece_size())]
    for start in range(0, len(words), 50):
        yield "".join(words[start : start + 50])
        yield "".join(reversed(words[start : start + 50]))
    for character in " \n\t-=_*.。a1":
        yield from (character * n for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100))
    yield from (
        "",
        "  a  b   c",
        "\r\n\r\n",
        "▁",
        "▁ ▁▁",
        "\x00\x1f\x7f",
        "👨‍👩‍👧 e\u0301 ﷽ 𠮷",
        "</s><s><unk><0x0A>[gMASK]<sop><|user|>",
    )


def _compare(tokenizer: ChatGLM2Tokenizer, fast: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
    options = {"add_special_tokens": True, "split_special_tokens": True}
    for text in texts:
        ids, fast_ids = tokenizer(text, **options)["input_ids"], fast(text, **options)["input_ids"]
        if ids != fast_ids:
            raise InputError(f"to_fast: the fast tokenizer gives other ids for {text[:60]!r}: {fast_ids} for {ids}")
