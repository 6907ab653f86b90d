"""ChatGLM2-6B, ChatGLM3-6B and GLM-4 in their authors' layout, read as transformers' Glm models.

transformers 5 has no `chatglm` model, but its GlmForCausalLM computes the same function (ChatGLM3's rope is written
out in float32, and ChatGLM2's is too here: the published ChatGLM2 builds its rope angles in half precision, which puts
it further from its own float32 result than this model is; that is not reproduced). So a config and the names of the
tensors are all that must be translated. A saved model is an ordinary Glm folder that needs none of this.

transformers' own weight conversion is not used here: it writes the original names back on saving, adapters included,
and its operation that splits a fused q/k/v is newer than the oldest transformers that this project supports. Ranges of
rows say the same, and let q, k and v be read straight from the file.
"""

import re
from pathlib import Path
from typing import Any, Literal

from transformers import GlmConfig

from glm.errors import InputError
from glm.models.checkpoint import Checkpoint, LazyTensor

Rope = Literal["auto", "base", "linear"]

# The published models all have these values; others would be another architecture.
REQUIRED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
}
_SIZES = (
    "padded_vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "kv_channels",
    "layernorm_epsilon",
)
_RENAMED = {
    r"^transformer\.embedding\.word_embeddings\.": "model.embed_tokens.",
    r"^transformer\.encoder\.layers\.": "model.layers.",
    r"^transformer\.encoder\.final_layernorm\.": "model.norm.",
    r"^transformer\.output_layer\.": "lm_head.",
    r"\.self_attention\.dense\.": ".self_attn.o_proj.",
    r"\.mlp\.dense_h_to_4h\.": ".mlp.gate_up_proj.",
    r"\.mlp\.dense_4h_to_h\.": ".mlp.down_proj.",
}
_FUSED = ".self_attention.query_key_value."


def glm_config(original: dict[str, Any], path: Path, rope: Rope = "auto") -> GlmConfig:
    """Translate the config.json of ChatGLM2, ChatGLM3 or GLM-4 (`path` is named in errors).

    `rope` says what `rope_ratio` means, which the config does not tell: "base" multiplies the base of the rotary
    frequencies (ChatGLM3-6B-32k and -128k, GLM-4), "linear" divides the positions (ChatGLM2-6B-32k). "auto" takes
    "linear" where `_name_or_path` holds "chatglm2", else "base".

    Raises InputError for a missing size, and for a setting that these models do not have.
    """
    for field in _SIZES:
        if field not in original:
            raise InputError(f"{path}: {field} is missing; ChatGLM2, ChatGLM3 and GLM-4 configs have it")
    for field, value in REQUIRED.items():
        if original.get(field, value) != value:
            raise InputError(f"{path}: {field} is {original[field]}; ChatGLM2, ChatGLM3 and GLM-4 have {value}")
    if "vision_config" in original:
        raise InputError(f"{path}: vision_config: GLM-4V models are not supported, only text models")
    heads = original["num_attention_heads"]
    groups = original["multi_query_group_num"] if original.get("multi_query_attention") else heads
    return GlmConfig(
        vocab_size=original["padded_vocab_size"],
        hidden_size=original["hidden_size"],
        intermediate_size=original["ffn_hidden_size"],
        num_hidden_layers=original["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=original["kv_channels"],
        attention_bias=original.get("add_qkv_bias", False),
        attention_dropout=original.get("attention_dropout", 0.0),
        rms_norm_eps=original["layernorm_epsilon"],
        max_position_embeddings=original.get("seq_length", 2048),
        rope_parameters=_rope_parameters(original, rope),
        tie_word_embeddings=original.get("tie_word_embeddings", False),
        use_cache=original.get("use_cache", True),
        bos_token_id=None,
        eos_token_id=original.get("eos_token_id", 2),
        pad_token_id=original.get("pad_token_id", 0),
        dtype=original.get("torch_dtype", original.get("dtype")),
    )


def _rope_parameters(original: dict[str, Any], rope: Rope) -> dict[str, Any]:
    # Half of each head is rotated, in neighbouring pairs, as Glm does.
    ratio = float(original.get("rope_ratio", 1))
    if rope == "auto":
        rope = "linear" if "chatglm2" in str(original.get("_name_or_path", "")).lower() else "base"
    if rope == "linear" and ratio != 1:
        return {"rope_type": "linear", "factor": ratio, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}


def glm_state_dict(checkpoint: Checkpoint, config: GlmConfig) -> dict[str, LazyTensor]:
    """The tensors of an original checkpoint under Glm's names, unread. The fused q/k/v projection becomes three.

    Rope tables are left out (computed), and a prefix encoder too (it is an adapter). Packed int4 and int8 weights and
    their scales are cut by the same rows. Raises InputError for a tensor that is none of these.
    """
    query_rows = config.num_attention_heads * config.head_dim
    group_rows = config.num_key_value_heads * config.head_dim
    rows = {
        "q_proj": slice(0, query_rows),
        "k_proj": slice(query_rows, query_rows + group_rows),
        "v_proj": slice(query_rows + group_rows, query_rows + 2 * group_rows),
    }
    state: dict[str, LazyTensor] = {}
    for original, stored in checkpoint.tensors.items():
        if original.endswith("rotary_pos_emb.inv_freq") or ".prefix_encoder." in original:
            continue
        name = original
        for pattern, replacement in _RENAMED.items():
            name = re.sub(pattern, replacement, name)
        if name.startswith("transformer."):
            raise InputError(f"{stored.file}: {original} is no tensor of ChatGLM2, ChatGLM3 or GLM-4")
        if _FUSED not in name:
            state[name] = LazyTensor(checkpoint, original)
            continue
        if stored.shape[0] != query_rows + 2 * group_rows:
            raise InputError(
                f"{stored.file}: {original} has {stored.shape[0]} rows, but config.json asks for "
                f"{query_rows + 2 * group_rows} ({config.num_attention_heads} + 2 * {config.num_key_value_heads} heads "
                f"of {config.head_dim})"
            )
        for projection, wanted in rows.items():
            state[name.replace(_FUSED, f".self_attn.{projection}.")] = LazyTensor(checkpoint, original, rows=wanted)
    return state
