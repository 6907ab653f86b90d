"""LoRA adapters (Hu et al. 2021) on any causal LM of this project, in PEFT's format."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from glm.config import Sft
from glm.errors import InputError

SCORE_KEY = "base_model.model.score.weight"  # where PEFT keeps a sequence classifier's head
SCORE_NAME = "score.safetensors"  # the head of a reward model that is no LoRA


def add_lora(model: PreTrainedModel | PeftModel, params: Sft, name: str = "default") -> PeftModel:
    """Freeze `model` and put a fresh LoRA on it; only the LoRA's matrices, kept in float32, require a gradient.

    LoRAs that stand on the model already, on a quantised one say, stay active beneath the new one.

    Raises:
        InputError: a name of `params.lora_target` matches no module of the model.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=target_modules(model, params.lora_target),
        use_rslora=params.use_rslora,
        use_dora=params.use_dora,
        init_lora_weights="pissa" if params.init_lora_weights == "pissa" else True,
    )
    return _put_lora(model, config, name, trainable=True)


def target_modules(model: PreTrainedModel | PeftModel, wanted: list[str] | str) -> list[str] | str:
    """Module names for PEFT. `query_key_value`, the reference's default, means q/k/v_proj where a model splits it."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name]
    leaves = {name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in linears}
    if isinstance(wanted, str):
        # PEFT would take the matrices of LoRAs that are there already for linears of the model.
        return sorted(leaves - {"lm_head"}) if active_loras(model) else wanted
    names = []
    for name in wanted:
        split = ["q_proj", "k_proj", "v_proj"] if name == "query_key_value" and name not in leaves else [name]
        missing = [part for part in split if part not in leaves]
        if missing:
            architecture = type(causal_lm(model)).__name__
            raise InputError(f"lora_target: {name!r} is no linear module of {architecture}; it has {sorted(leaves)}")
        names += split
    return names


def load_lora(
    model: PreTrainedModel | PeftModel, folder: str | Path, *, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Put the LoRA saved in `folder` on `model` as its adapter `name`, above those that are active.

    The head of a reward model is left out, see `load_score`.

    Raises:
        InputError: `folder` holds no adapter, or one that was made for another model.
    """
    _check_folder(folder)
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, not trainable
    config.base_model_name_or_path = None  # where it was trained; PEFT would warn of another name
    adapted = _put_lora(model, config, name, trainable=trainable)
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    weights.pop(SCORE_KEY, None)
    try:
        result = set_peft_model_state_dict(adapted, weights, adapter_name=name)
    except RuntimeError as error:
        raise InputError(f"{folder}: not a LoRA of this model: {str(error).splitlines()[-1].strip()}") from error
    if result.unexpected_keys:
        raise InputError(f"{folder}: not a LoRA of this model: it has no {result.unexpected_keys[0]}")
    return adapted


def _put_lora(model: PreTrainedModel | PeftModel, config: LoraConfig, name: str, *, trainable: bool) -> PeftModel:
    below = active_loras(model)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    model.base_model.set_adapter([*below, name], inference_mode=not trainable)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and f".{name}." in parameter_name and ".lora_" in parameter_name)
    return model


def active_loras(model: PreTrainedModel | PeftModel) -> list[str]:
    """Names of the LoRAs that a forward pass uses."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return list(layers[0].active_adapters) if layers and not layers[0].disable_adapters else []


def plain_name(parameter: str) -> str:
    """The name that a parameter of the model has without PEFT's wrappers."""
    return parameter.removeprefix("base_model.model.").replace(".base_layer.", ".")


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
    """Add a reward model's head [1, hidden] to what was saved in `folder`.

    A LoRA gets it as PEFT saves a sequence classifier's, so that the folder loads on
    AutoModelForSequenceClassification(num_labels=1) with PEFT alone. Else it is a file of its own.
    """
    folder = Path(folder)
    weight = score.weight.detach().float().cpu().contiguous()
    if not (folder / "adapter_config.json").exists():
        save_file({"score.weight": weight}, folder / SCORE_NAME, metadata={"format": "pt"})
        return
    weights = load_file(folder / "adapter_model.safetensors")
    weights[SCORE_KEY] = weight
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config.update(task_type="SEQ_CLS", modules_to_save=["score"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_score(folder: str | Path) -> nn.Linear:
    """The reward head that `save_score` wrote: Linear(hidden → 1), without bias.

    Raises:
        InputError: there is none.
    """
    folder = Path(folder)
    path = folder / "adapter_model.safetensors"
    path = path if path.exists() else folder / SCORE_NAME
    weights = load_file(path) if path.exists() else {}
    weight = next((weights[name] for name in (SCORE_KEY, "score.weight") if name in weights), None)
    if weight is None:
        raise InputError(f"{path}: no reward head; was it made by the reward step?")
    score = nn.Linear(weight.shape[1], 1, bias=False)
    score.load_state_dict({"weight": weight})
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
    """The backbone's last hidden states [batch, length, hidden], without the vocabulary head."""
    causal = causal_lm(model)
    with half_precision(model):
        outputs = causal.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    return outputs.last_hidden_state


def half_precision(model: PeftModel | PreTrainedModel) -> torch.autocast:
    """Mixed precision on a model that was loaded in bfloat16: what is trained is kept in float32 and multiplied so."""
    causal = causal_lm(model)
    loaded_in_half = torch.bfloat16 in (causal.dtype, causal.config.dtype)
    return torch.autocast(causal.device.type, dtype=torch.bfloat16, enabled=loaded_in_half)


def mixed_dtypes(model: PeftModel | PreTrainedModel) -> bool:
    """Whether weights of a half-precision model are being trained in float32; LoRA casts for itself."""
    causal = causal_lm(model)
    return causal.config.dtype == torch.bfloat16 and any(
        parameter.dtype == torch.float32 and ".lora_" not in name and "prefix_encoder." not in name
        for name, parameter in causal.named_parameters()
    )


def causal_lm(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The language model itself, without PEFT's wrapper; its LoRA layers stay in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_folder(folder: str | Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise InputError(f"{folder}: no {name}: not a saved LoRA adapter")
