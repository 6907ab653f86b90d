"""The layout in which the authors publish ChatGLM: for their code, for vLLM's ChatGLM class, for converters.

    ChatGLM-6B                          transformer.layers.N...          ice_text.model
    ChatGLM2-6B, ChatGLM3-6B, GLM-4     transformer.encoder.layers.N...  tokenizer.model

Names, dtypes and the packing of int4 and int8 are those of their own files (tests compare them byte by byte with what
their code saved). A P-Tuning v2 prefix lies among the weights, as their ptuning code has it. Their Python files are
never run here; they are copied along where the base folder has them, else the config names their place on the hub.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from glm.errors import InputError
from glm.files import write_json
from glm.models.chatglm1 import ChatGLMConfig, ChatGLMForCausalLM
from glm.models.chatglm2 import REQUIRED
from glm.models.prefix import prefix_of
from glm.models.quantization import BLOCK_LINEAR, pack, row_scales
from glm.models.tokenization_chatglm1 import ChatGLM1Tokenizer
from glm.models.tokenization_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from glm.models.tokenization_glm4 import is_tiktoken

# The authors' repositories: nothing but these names tells `load_tokenizer` ChatGLM2 and ChatGLM3 apart.
REPOSITORIES = {
    "chatglm1": "THUDM/chatglm-6b",
    "chatglm2": "THUDM/chatglm2-6b",
    "chatglm3": "THUDM/chatglm3-6b",
    "glm4": "THUDM/glm-4-9b-chat",
}
_RENAMED = {
    r"^model\.embed_tokens\.": "transformer.embedding.word_embeddings.",
    r"^model\.layers\.": "transformer.encoder.layers.",
    r"^model\.norm\.": "transformer.encoder.final_layernorm.",
    r"^model\.prefix_encoder\.": "transformer.prefix_encoder.",
    r"^lm_head\.": "transformer.output_layer.",
    r"\.self_attn\.o_proj\.": ".self_attention.dense.",
    r"\.mlp\.gate_up_proj\.": ".mlp.dense_h_to_4h.",
    r"\.mlp\.down_proj\.": ".mlp.dense_4h_to_h.",
}
_FUSED = re.compile(r"\.self_attn\.q_proj\.")


def write_authors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: Path,
    hub_id: str | None,
    bits: int | None,
    max_shard_size: str,
) -> None:
    """Write a whole model, LoRA merged, into the existing `folder`; its blocks' linears packed into `bits` if given.

    Args:
        base: the folder of the base model: where the authors' Python files and GLM-4's vocabulary are taken from.
        hub_id: the base's id on the hub, where a loader that runs remote code will find theirs.
        bits: 4 or 8; None: weights as they are.

    Raises:
        InputError: another model than ChatGLM and GLM-4, or GLM-4's tokenizer.model is not in `base`.
    """
    generation = generation_of(model, tokenizer)
    write_tokenizer(tokenizer, generation, base, folder)
    code = sorted(base.glob("*.py"))
    for file in code:
        shutil.copyfile(file, folder / file.name)
    place = f"{hub_id}--" if hub_id and not code else ""
    write_json(folder / "config.json", authors_config(model, generation, bits, place))
    state = {name: tensor.detach().cpu() for name, tensor in authors_state(model, bits).items()}
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size)


def generation_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Which of `REPOSITORIES` the model is built as.

    Raises:
        InputError: none of them.
    """
    if isinstance(model, ChatGLMForCausalLM):
        return "chatglm1"
    if not isinstance(model, GlmForCausalLM):
        raise InputError(
            f"export.layout authors: {type(model).__name__} is neither ChatGLM nor GLM-4; choose layout transformers, "
            "and quantization none or nf4"
        )
    if isinstance(tokenizer, ChatGLM3Tokenizer):  # a kind of ChatGLM2Tokenizer
        return "chatglm3"
    return "chatglm2" if isinstance(tokenizer, ChatGLM2Tokenizer) else "glm4"


def authors_state(model: PreTrainedModel, bits: int | None) -> dict[str, Tensor]:
    """The tensors of a whole model under the authors' names, rope tables included, q, k and v as one again."""
    dtype = model.dtype
    if isinstance(model, ChatGLMForCausalLM):
        state = dict(model.state_dict())
        state["lm_head.weight"] = state["transformer.word_embeddings.weight"].clone()  # tied, and stored twice by them
        size = model.config.hidden_size // model.config.num_attention_heads // 2
        for layer in range(model.config.num_layers):
            state[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = rope_table(size, dtype)
    else:
        state = _renamed(model.state_dict())
        if model.config.tie_word_embeddings:
            state["transformer.output_layer.weight"] = state["transformer.output_layer.weight"].clone()
        state["transformer.rotary_pos_emb.inv_freq"] = rope_table(model.config.head_dim // 2, dtype)
    if bits is None:
        return state
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if BLOCK_LINEAR.search(name):
            packed[name], packed[f"{name}_scale"] = pack(tensor, bits), row_scales(tensor, bits)
        else:
            packed[name] = tensor
    return packed


def _renamed(glm: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in glm.items():
        if re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue
        if _FUSED.search(name):
            parts = [glm[_FUSED.sub(f".self_attn.{part}_proj.", name)] for part in "qkv"]
            name, tensor = _FUSED.sub(".self_attention.query_key_value.", name), torch.cat(parts)
        for pattern, replacement in _RENAMED.items():
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    return state


def rope_table(size: int, dtype: torch.dtype) -> Tensor:
    """inv_freq [size / 2] of rotary embeddings (Su et al. 2021), which the authors keep among the weights."""
    return (1.0 / (10000 ** (torch.arange(0, size, 2) / size))).to(dtype)


def authors_config(model: PreTrainedModel, generation: str, bits: int | None, place: str = "") -> dict[str, Any]:
    """config.json in the authors' names. `place` comes before the Python modules' names: "owner/name--", or nothing."""
    classes = ("AutoModel", "AutoModelForSeq2SeqLM", *(["AutoModelForCausalLM"] if generation != "chatglm1" else []))
    config: dict[str, Any] = {
        "_name_or_path": REPOSITORIES[generation],
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": f"{place}configuration_chatglm.ChatGLMConfig"}
        | {name: f"{place}modeling_chatglm.ChatGLMForConditionalGeneration" for name in classes},
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "use_cache": True,
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
        "quantization_bit": bits or 0,
    }
    encoder = prefix_of(model)
    if encoder is not None:
        config |= {"pre_seq_len": encoder.embedding.num_embeddings, "prefix_projection": encoder.trans is not None}
    sizes = _chatglm1_sizes(model.config) if generation == "chatglm1" else _glm_sizes(model.config)
    return config | sizes


def _chatglm1_sizes(config: ChatGLMConfig) -> dict[str, Any]:
    names = (
        *("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size", "layernorm_epsilon"),
        *("max_sequence_length", "position_encoding_2d", "bos_token_id", "mask_token_id", "gmask_token_id"),
    )
    return {name: getattr(config, name) for name in names}


def _glm_sizes(config: GlmConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    if rope["partial_rotary_factor"] != 0.5 or rope["rope_type"] not in ("default", "linear"):
        raise InputError(f"export.layout authors: rope_parameters {rope}: the authors' code has no such rope")
    ratio = rope["factor"] if rope["rope_type"] == "linear" else rope["rope_theta"] / 10000
    return {
        "padded_vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "multi_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "multi_query_group_num": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "add_qkv_bias": config.attention_bias,
        "layernorm_epsilon": config.rms_norm_eps,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": False,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
        **REQUIRED,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
    } | ({} if ratio == 1 else {"rope_ratio": int(ratio) if ratio == int(ratio) else ratio})


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, generation: str, base: Path, folder: Path) -> None:
    """The vocabulary as the authors have it, and a tokenizer_config.json that names their class."""
    if generation == "glm4":
        if not (base / "tokenizer.model").exists() or not is_tiktoken(base / "tokenizer.model"):
            raise InputError(f"export.layout authors: {base} has no tokenizer.model of GLM-4's authors")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(base / name, folder / name)
        return
    config: dict[str, Any] = {
        "name_or_path": REPOSITORIES[generation],
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "remove_space": False,
        "do_lower_case": False,
    }
    if isinstance(tokenizer, ChatGLM1Tokenizer):
        special = ("bos_token", "eos_token", "end_token", "gmask_token", "mask_token", "pad_token", "unk_token")
        config |= {name: str(getattr(tokenizer, name)) for name in special}
        config["num_image_tokens"] = tokenizer.num_image_tokens
    shutil.copyfile(tokenizer.vocab_file, folder / tokenizer.vocab_files_names["vocab_file"])
    write_json(folder / "tokenizer_config.json", config)
