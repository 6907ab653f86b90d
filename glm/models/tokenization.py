"""Loading a tokenizer: which generation a folder holds, and with which prompt format."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from glm.errors import InputError
from glm.models.chat_templates import CHAT_TEMPLATES, GLM4
from glm.models.tokenization_base import SentencePieceChatTokenizer
from glm.models.tokenization_chatglm1 import ChatGLM1Tokenizer
from glm.models.tokenization_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from glm.models.tokenization_glm4 import glm4_tokenizer, is_tiktoken

_CLASSES: dict[str, type[SentencePieceChatTokenizer]] = {
    "chatglm1": ChatGLM1Tokenizer,
    "chatglm2": ChatGLM2Tokenizer,
    "chatglm3": ChatGLM3Tokenizer,
}
_HUB_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
_SAVED = {tokenizer_class.__name__: generation for generation, tokenizer_class in _CLASSES.items()}


def load_tokenizer(
    path: str | Path,
    *,
    generation: str | None = None,
    chat_template_name: str | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a hub id, padding on the left and with a pad token.

    Takes the folders that the authors of ChatGLM published, folders that this project saved, and whatever
    transformers' AutoTokenizer knows. Remote code is never run.

    Args:
        path: folder or hub id.
        generation: "chatglm1", "chatglm2", "chatglm3" or "glm4"; needed only where the folder's files do not say.
        chat_template_name: prompt format instead of the tokenizer's own: the name of a generation. For ChatGLM-6B,
            "chatglm2" gives numbered rounds in its token layout, as ChatGLM Efficient Tuning trained it.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: the folder or a file is missing or not what it should be, the generation cannot be told, or the
            prompt format does not exist for this tokenizer.
    """
    for name, value in (("generation", generation), ("chat_template_name", chat_template_name)):
        if value is not None and value not in CHAT_TEMPLATES:
            raise InputError(f"{name}: {value!r} is not one of {', '.join(CHAT_TEMPLATES)}")
    folder = _folder(str(path), revision)
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    generation = generation or _generation(str(path), folder, tokenizer_config)
    if generation is None:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        templates = CHAT_TEMPLATES
    elif generation == "glm4":
        tokenizer = glm4_tokenizer(_vocabulary(folder, "tokenizer.model"), tokenizer_config)
        templates = {"glm4": GLM4}
    else:
        tokenizer_class = _CLASSES[generation]
        _vocabulary(folder, tokenizer_class.vocab_files_names["vocab_file"])
        templates = tokenizer_class.chat_templates
        # A template that the authors' folder brings has no marks for answers: ours gives the same prompts with marks.
        own = {} if tokenizer_config.get("tokenizer_class") in _SAVED else {"chat_template": templates[generation]}
        tokenizer = tokenizer_class.from_pretrained(folder, **own)
    if chat_template_name is not None:
        if chat_template_name not in templates:
            names = ", ".join(templates)
            raise InputError(f"chat_template_name: {chat_template_name!r} does not exist for {generation}: use {names}")
        tokenizer.chat_template = templates[chat_template_name]
    return tokenizer


def _generation(path: str, folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """Name of the ChatGLM generation that the files speak of; None for anything else."""
    config = _read_json(folder / "config.json")
    tokenizer_class = tokenizer_config.get("tokenizer_class")
    if tokenizer_class in _SAVED:
        return _SAVED[tokenizer_class]
    if tokenizer_class == "ChatGLM4Tokenizer":
        return "glm4"
    unnamed = tokenizer_class is None and config.get("model_type") == "chatglm"
    if tokenizer_class != "ChatGLMTokenizer" and not unnamed:
        return None
    if (folder / "ice_text.model").exists():
        return "chatglm1"
    if is_tiktoken(_vocabulary(folder, "tokenizer.model")):
        return "glm4"
    # ChatGLM2 and ChatGLM3 share this file; only their names, or role tokens in the configuration, tell them apart.
    names = {
        "tokenizer_config.json: name_or_path": tokenizer_config.get("name_or_path"),
        "config.json: _name_or_path": config.get("_name_or_path"),
        "path": Path(path).name,
    }
    roles = "<|assistant|>" in json.dumps(tokenizer_config)
    for name in names.values():
        said = {generation for generation in ("chatglm2", "chatglm3") if generation in str(name).lower()}
        if len(said) == 1 and not (roles and "chatglm2" in said):
            return said.pop()
    if roles:
        return "chatglm3"
    looked_at = "; ".join(f"{where} = {name!r}" for where, name in names.items())
    raise InputError(
        f"{path}: ChatGLM2 or ChatGLM3? Both use this tokenizer.model, and nothing else tells ({looked_at}; no role "
        "tokens in tokenizer_config.json): give generation='chatglm2' or 'chatglm3'"
    )


def _folder(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise InputError(f"{path}: no such folder")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises several kinds: offline, unknown repository, unknown revision
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: no such folder, and not to be had from the hub: {reason}") from error


def _vocabulary(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        raise InputError(f"{folder}: {name} is missing")
    return folder / name


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: must hold a JSON object, holds {type(value).__name__}")
    return value
