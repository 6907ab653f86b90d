"""LoRA adapters (Hu et al. 2021) on any causal LM of this project, in PEFT's format."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from glm.config import Sft
from glm.errors import InputError

SCORE_KEY = "base_model.model.score.weight"  # where PEFT keeps a sequence classifier's head


def add_lora(model: PreTrainedModel, params: Sft) -> PeftModel:
    """Freeze `model` and put a fresh LoRA on it; only the LoRA's matrices, kept in float32, require a gradient.

    Raises:
        InputError: a name of `params.lora_target` matches no module of the model.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=target_modules(model, params.lora_target),
    )
    return get_peft_model(model, config)


def target_modules(model: PreTrainedModel, wanted: list[str] | str) -> list[str] | str:
    """Module names for PEFT. `query_key_value`, the reference's default, means q/k/v_proj where a model splits it."""
    if isinstance(wanted, str):
        return wanted
    leaves = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = []
    for name in wanted:
        split = ["q_proj", "k_proj", "v_proj"] if name == "query_key_value" and name not in leaves else [name]
        missing = [part for part in split if part not in leaves]
        if missing:
            raise InputError(
                f"lora_target: {name!r} is no linear module of {type(model).__name__}; it has {sorted(leaves)}"
            )
        names += split
    return names


def load_lora(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put the LoRA saved in `folder` on `model` as its adapter "default".

    Raises:
        InputError: `folder` holds no adapter.
    """
    _check_folder(folder)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def load_more_lora(model: PeftModel, folder: str | Path, name: str) -> None:
    """Add the LoRA of `folder` under `name`, frozen, beside the adapters that `model` has; the active one stays."""
    active = model.active_adapter
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    model.add_adapter(name, config)
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    weights.pop(SCORE_KEY, None)
    result = set_peft_model_state_dict(model, weights, adapter_name=name)
    if result.unexpected_keys:
        raise InputError(f"{folder}: not a LoRA of this model: it has no {result.unexpected_keys[0]}")
    model.set_adapter(active)


def save_lora(model: PeftModel, folder: str | Path, base: str, name: str = "default") -> None:
    """Write one adapter in PEFT's format into the existing `folder`. `base` is recorded as the model it stands on."""
    model.peft_config[name].base_model_name_or_path = base
    # Left to itself, PEFT takes the padded vocabularies of ChatGLM for resized ones and saves the whole embedding.
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    folder = Path(folder)
    if name != "default":  # PEFT puts other adapters into a sub-folder
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def save_score(folder: str | Path, score: nn.Linear) -> None:
    """Add a reward model's head [1, hidden] to a saved LoRA, as PEFT saves a sequence classifier.

    The folder then loads on AutoModelForSequenceClassification(num_labels=1) with PEFT alone, and here.
    """
    folder = Path(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights[SCORE_KEY] = score.weight.detach().float().cpu().contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config.update(task_type="SEQ_CLS", modules_to_save=["score"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_score(folder: str | Path) -> nn.Linear:
    """The reward head that `save_score` wrote: Linear(hidden → 1), without bias."""
    path = Path(folder) / "adapter_model.safetensors"
    weights = load_file(path)
    if SCORE_KEY not in weights:
        raise InputError(f"{path}: no reward head ({SCORE_KEY}); was it made by the reward step?")
    score = nn.Linear(weights[SCORE_KEY].shape[1], 1, bias=False)
    score.load_state_dict({"weight": weights[SCORE_KEY]})
    return score


def trainable_count(model: nn.Module) -> tuple[int, int]:
    """(parameters that are trained, all parameters)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def last_hidden(
    model: PeftModel | PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """The backbone's last hidden states [batch, length, hidden], without the vocabulary head.

    On a bfloat16 model adapters are kept in float32 and multiplied in bfloat16, as in mixed-precision training.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.autocast(causal.device.type, dtype=torch.bfloat16, enabled=causal.dtype == torch.bfloat16):
        outputs = causal.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    return outputs.last_hidden_state.to(causal.dtype)  # under autocast a LayerNorm at the end gives float32


def _check_folder(folder: str | Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise InputError(f"{folder}: no {name}: not a saved LoRA adapter")
