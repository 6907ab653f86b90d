"""`load_model`: one way in for every checkpoint layout, base quantisation and adapter that this project knows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GlmConfig,
    GlmForCausalLM,
    GlmForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from glm.errors import InputError
from glm.models import lineage, methods, prefix
from glm.models.chatglm1 import ChatGLMConfig, ChatGLMForCausalLM, ChatGLMForSequenceClassification
from glm.models.chatglm2 import Rope, glm_config, glm_state_dict
from glm.models.checkpoint import Checkpoint, LazyTensor, local_folder, read_config
from glm.models.quantization import (
    BITSANDBYTES,
    CPM,
    CpmConfig,
    bitsandbytes_config,
    check_quantization,
    keep_bitsandbytes_layout,
    packed_on_read,
)

Task = Literal["causal_lm", "sequence_classification"]
Generation = Literal["chatglm1", "chatglm2", "glm", "other"]

_CLASSES: dict[tuple[Generation, Task], type[PreTrainedModel]] = {
    ("chatglm1", "causal_lm"): ChatGLMForCausalLM,
    ("chatglm1", "sequence_classification"): ChatGLMForSequenceClassification,
    ("chatglm2", "causal_lm"): GlmForCausalLM,
    ("chatglm2", "sequence_classification"): GlmForSequenceClassification,
    ("glm", "causal_lm"): GlmForCausalLM,
    ("glm", "sequence_classification"): GlmForSequenceClassification,
}


def load_model(
    path_or_hub_id: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: str | None = None,
    double_quantization: bool = True,
    dequantize: bool = False,
    revision: str | None = None,
    task: Task = "causal_lm",
    num_labels: int = 1,
    attn_implementation: str | None = None,
    rope: Rope = "auto",
) -> PreTrainedModel:
    """Load a causal language model, or one with a classification head, in evaluation mode.

    `path_or_hub_id` is a folder or hub repository of ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B or GLM-4 as their authors
    published them (also int4 and int8), one that this project saved, or any causal language model of transformers.
    Which it is, is read from its config alone. Remote code is never run. The second to fourth generation become
    transformers' Glm classes. Weights are read one tensor at a time: memory for the model plus one shard.
    A folder that a stage has trained (models/sft, say) is loaded with all that it stands on, see `glm.models.lineage`.

    `adapters` are applied in the given order: folders of PEFT's format (LoRA), folders of this project's prefixes and
    trained layers, or files and checkpoints of the authors' P-Tuning v2. LoRA is merged into the weights; on a
    quantised base it stays beside them, all adapters active. A prefix always stays beside the weights.

    `dtype` None takes the checkpoint's own. `device` None is the CPU. `quantization` is "cpm-int4" or "cpm-int8" (the
    authors' format, packed while reading), bitsandbytes' "nf4", "fp4", "int8", or "none"; None means as an adapter was
    trained, else none. `double_quantization` is for the 4-bit kinds of bitsandbytes. With `dequantize` rounded weights
    are then held in `dtype`, so that adapters can be merged into them.

    `revision` is a hub commit. `num_labels` sizes the head of "sequence_classification" (1 for a reward model).
    `rope` tells what `rope_ratio` means in long-context variants, see `glm.models.chatglm2.glm_config`.

    Raises InputError, one line naming the file or argument, before weights are read: a missing folder, config or
    shard, a truncated file, a `.bin` with other objects than tensors, a config of no known model, a vocabulary that
    does not fit the config, an unknown quantisation.
    """
    if Path(path_or_hub_id, lineage.FILE_NAME).exists():
        _, below = lineage.read_lineage(path_or_hub_id)
        if below is not None:
            adapters = (*below.adapters, path_or_hub_id, *adapters)
            path_or_hub_id, revision = below.base, below.revision
            dtype = dtype or below.dtype
            if quantization is None:
                quantization, double_quantization = below.quantization, below.double_quantization
    path_or_hub_id, revision = lineage.source_of(str(path_or_hub_id), revision)
    quantization = None if quantization == "none" else quantization
    check_quantization(quantization)
    if task not in ("causal_lm", "sequence_classification"):
        raise InputError(f"task: {task!r} is unknown; choose causal_lm or sequence_classification")
    if rope not in ("auto", "base", "linear"):
        raise InputError(f"rope: {rope!r} is unknown; choose auto, base or linear")
    folder = local_folder(str(path_or_hub_id), revision)
    original = read_config(folder)
    generation = recognise(original, folder / "config.json", task)
    if saved := _saved_by_bitsandbytes(original):
        if quantization is not None:
            raise InputError(f"quantization: {quantization!r}, but {folder} is {saved} already; leave it out")
        generation = "other"  # transformers reads it on its own, Glm and ChatGLM-6B too
    adapter_folders = [_adapter_path(adapter) for adapter in adapters]
    options: dict[str, Any] = {
        "device_map": None if device is None else {"": torch.device(device)},
        "attn_implementation": attn_implementation,
    }
    checkpoint = Checkpoint(folder)
    if generation == "other":
        model = _load_other(folder, dtype, quantization, double_quantization, task, num_labels, options)
    else:
        config = _native_config(original, folder / "config.json", generation, rope)
        if task == "sequence_classification":
            config.num_labels = num_labels
        config.dtype = _torch_dtype(dtype if dtype is not None else config.dtype)
        bits = _stored_bits(original, folder / "config.json")
        if bits is not None and quantization is not None and CPM.get(quantization) != bits:
            raise InputError(f"quantization: {quantization!r}, but {folder} is int{bits} already; leave it out")
        state = _native_state(checkpoint, config, generation, task)
        if bits is None and quantization in CPM:
            bits = CPM[quantization]
            state = packed_on_read(state, bits)
        if bits is not None:
            config.quantization_config = CpmConfig(bits=bits).to_dict()
        elif quantization is not None:
            options["quantization_config"] = bitsandbytes_config(quantization, config.dtype, double_quantization)
        if "quantization_config" not in options:  # bitsandbytes casts for itself
            state = {name: _read_as(tensor, config.dtype) for name, tensor in state.items()}
        model = _load_native(_CLASSES[generation, task], config, state, folder, options)
    if saved or quantization in BITSANDBYTES:
        keep_bitsandbytes_layout(model)
    if any(".prefix_encoder." in name for name in checkpoint.tensors):
        prefix.attach_prefix(model, prefix.read_prefix(model, folder))
    checkpoint.close()
    if (folder / prefix.BESIDE).exists():
        prefix.attach_prefix(model, prefix.read_prefix(model, folder / prefix.BESIDE))
    if dequantize and getattr(model, "is_quantized", False):
        model = model.dequantize(methods.loaded_dtype(model))
    for adapter in adapter_folders:
        model = methods.apply(model, adapter)
    if not getattr(model, "is_quantized", False):
        model.requires_grad_(True)  # merging has frozen it
    return model.eval()


def recognise(config: dict[str, Any], path: Path, task: Task = "causal_lm") -> Generation:
    """Tell the generation from config.json (`path` is named in errors); InputError says what was looked at."""
    model_type = config.get("model_type")
    if model_type == "chatglm":
        if "padded_vocab_size" in config:
            return "chatglm2"
        if "inner_hidden_size" in config or "position_encoding_2d" in config:
            return "chatglm1"
        raise InputError(
            f"{path}: model_type is chatglm, but there is neither padded_vocab_size (ChatGLM2, ChatGLM3, GLM-4) nor "
            "inner_hidden_size or position_encoding_2d (ChatGLM-6B)"
        )
    if model_type == "glm":
        return "glm"
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if task == "sequence_classification":
        known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if model_type in known:
        return "other"
    kind = "another kind of model" if model_type in CONFIG_MAPPING else "unknown to this version of transformers"
    raise InputError(f"{path}: model_type is {model_type!r}, neither chatglm nor a {task} of transformers ({kind})")


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype or "float32", None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"dtype: {dtype!r} is unknown; choose float32, bfloat16 or float16")
    return found


def _saved_by_bitsandbytes(original: dict[str, Any]) -> str | None:
    """ "nf4", "fp4" or "int8" for a folder whose weights bitsandbytes has quantised."""
    saved = original.get("quantization_config") or {}
    if saved.get("quant_method") != "bitsandbytes":
        return None
    return "int8" if saved.get("load_in_8bit") else str(saved["bnb_4bit_quant_type"])


def _stored_bits(original: dict[str, Any], path: Path) -> int | None:
    """Bits of the authors' packed format, from their `quantization_bit` or this project's `quantization_config`."""
    saved = original.get("quantization_config")
    if saved is not None and saved.get("quant_method") != "cpm":
        raise InputError(f"{path}: quantization_config: quant_method {saved.get('quant_method')!r} is not supported")
    bits = saved["bits"] if saved is not None else original.get("quantization_bit") or None
    if bits not in (None, 4, 8):
        raise InputError(f"{path}: quantization_bit is {bits!r}; it must be 4 or 8 (0 or none: not quantised)")
    return bits


def _native_config(original: dict[str, Any], path: Path, generation: Generation, rope: Rope) -> PreTrainedConfig:
    if generation == "chatglm2":
        return glm_config(original, path, rope)
    kept = {name: value for name, value in original.items() if name not in ("auto_map", "quantization_bit")}
    return GlmConfig.from_dict(kept) if generation == "glm" else _chatglm1_config(kept, path)


def _chatglm1_config(original: dict[str, Any], path: Path) -> ChatGLMConfig:
    for size in ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size", "bos_token_id"):
        if size not in original:
            raise InputError(f"{path}: {size} is missing; a ChatGLM-6B config has it")
    kept = {name: value for name, value in original.items() if name not in ("pre_seq_len", "prefix_projection")}
    try:
        return ChatGLMConfig.from_dict(kept)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _native_state(
    checkpoint: Checkpoint, config: PreTrainedConfig, generation: Generation, task: Task
) -> dict[str, LazyTensor]:
    """The checkpoint's tensors under the model's names, after a look at the shape of the embedding."""
    if generation == "chatglm2":
        state = glm_state_dict(checkpoint, config)
    else:
        state = {
            name: LazyTensor(checkpoint, name)
            for name in checkpoint.tensors
            if not name.endswith("rotary_emb.inv_freq") and ".prefix_encoder." not in name
        }
    embedding = "transformer.word_embeddings" if generation == "chatglm1" else "model.embed_tokens"
    for name in (f"{embedding}.weight", "lm_head.weight"):
        if name in state:
            stored = checkpoint.tensors[state[name].name]
            if stored.shape[0] != config.vocab_size:
                raise InputError(
                    f"{stored.file}: {state[name].name} has {stored.shape[0]} rows, but config.json has a "
                    f"vocabulary of {config.vocab_size}"
                )
    if f"{embedding}.weight_scale" in state:
        raise InputError(f"{checkpoint.path}: a quantised embedding (as in chatglm-6b-int4-qe) is not supported")
    if task == "sequence_classification" or config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _read_as(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Have a floating point tensor converted while it is copied out of the file, so that it is never held twice."""
    if not tensor.get_dtype().startswith(("F", "BF")) or tensor.change is not torch.clone:
        return tensor
    return replace(tensor, change=lambda stored: stored.to(dtype, copy=True))


def _load_native(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: dict[str, LazyTensor],
    folder: Path,
    options: dict[str, Any],
) -> PreTrainedModel:
    try:
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=config.dtype, output_loading_info=True, **options
        )
    except RuntimeError as error:
        raise InputError(f"{folder}: the weights do not fit config.json: {_first_mismatch(str(error))}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("score."))
    if missing:
        raise InputError(f"{folder}: the weights lack {missing[0]} ({len(missing)} such tensors)")
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _first_mismatch(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if "size" in line.lower() or "shape" in line.lower()]
    return (lines or message.splitlines())[0]


def _load_other(
    folder: Path,
    dtype: torch.dtype | str | None,
    quantization: str | None,
    double_quantization: bool,
    task: Task,
    num_labels: int,
    options: dict[str, Any],
) -> PreTrainedModel:
    if quantization in CPM:
        raise InputError(f"quantization: {quantization!r} is for ChatGLM and GLM-4; other models take nf4, fp4 or int8")
    chosen = _torch_dtype(dtype) if dtype is not None else "auto"
    if quantization is not None:
        compute = chosen if isinstance(chosen, torch.dtype) else torch.bfloat16
        options["quantization_config"] = bitsandbytes_config(quantization, compute, double_quantization)
    options["dtype"] = chosen
    if task == "sequence_classification":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels, **options)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _adapter_path(adapter: str | Path) -> Path:
    path = Path(adapter)
    if path.is_file():
        return path
    folder = local_folder(str(adapter))
    if methods.method_of(folder) == "full":
        raise InputError(
            f"{folder}: no adapter; looked for adapter_config.json (LoRA), {methods.WEIGHTS_NAME} (freeze) and a "
            "prefix encoder's weights, found a whole model: give it as the model itself"
        )
    return folder
