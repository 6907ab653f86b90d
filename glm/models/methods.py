"""The four ways to tune a model: `start` makes it trainable, `finish` ends that, `apply` puts a saved result on it.

    lora      matrices of low rank beside the linears (Hu et al. 2021), with rsLoRA, DoRA and PiSSA; `adapters`
    p_tuning  keys and values in front of every layer's own (P-Tuning v2); `prefix`
    freeze    the MLP or the query, key and value projections of the first or last layers, all else frozen
    full      every weight

What is trained is kept in float32, whatever the model was loaded in; a bfloat16 model is then computed in mixed
precision (`adapters.half_precision`). Weights of freeze and full are saved in the dtype that the model was loaded in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from glm.config import Method, Sft
from glm.errors import InputError
from glm.models import adapters, pissa, prefix
from glm.models.adapters import causal_lm, plain_name

WEIGHTS_NAME = "trained_weights.safetensors"  # of method freeze

Tunable: TypeAlias = PeftModel | PreTrainedModel


def start(model: PreTrainedModel, method: Method, shape: Sft, copy_of: str | Path | None = None) -> Tunable:
    """Freeze `model` but for what `method` trains: fresh in the given shape, or a copy of the folder `copy_of`.

    A copy keeps its own shape. The result is `model` itself, under PEFT's wrapper where the method is lora.

    Raises:
        InputError: the model lacks what is to be trained, its weights are quantised (freeze, full), or the copy was
            made by another method or for another model.

    `finish` comes after the training, `saving.save_trained` after that.
    """
    if copy_of is not None and (found := method_of(Path(copy_of))) != method:
        raise InputError(f"{copy_of}: was trained by method {found}, which {method} cannot go on with")
    if method == "lora":
        if copy_of is not None:
            return adapters.load_lora(model, copy_of, trainable=True)
        adapted = adapters.add_lora(model, shape)
        if shape.init_lora_weights == "pissa":
            pissa.remember_start(adapted)
        return adapted
    model.requires_grad_(False)
    if method == "p_tuning":
        if copy_of is None:
            prefix.new_prefix(model, shape.pre_seq_len, shape.prefix_projection)
        else:
            prefix.attach_prefix(model, prefix.read_prefix(model, Path(copy_of)).requires_grad_(True))
        return model
    if getattr(model, "is_quantized", False):
        raise InputError(f"method {method} trains weights themselves; those of this model are quantised")
    if copy_of is not None:
        names = apply_weights(model, Path(copy_of))
    elif method == "freeze":
        names = chosen_weights(model, shape)
    else:
        names = [name for name, _ in model.named_parameters() if "prefix_encoder" not in name]
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def chosen_weights(model: Tunable, shape: Sft) -> list[str]:
    """Names of the parameters that `freeze` trains: one part of the last (or, if negative, the first) layers.

    `name_module_trainable` is a layer's whole "mlp", or "qkv": the projections to queries, keys and values, which are
    one module in some models and three in others. Modules are found by their place, never by parts of their names.

    Raises:
        InputError: the model has fewer layers, or no such module.
    """
    causal = causal_lm(model)
    layers = [
        (name, module) for name, module in causal.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    number = shape.num_layer_trainable
    if abs(number) > len(layers):
        raise InputError(f"num_layer_trainable: {number}, but {type(causal).__name__} has {len(layers)} layers")
    names = []
    for layer_name, layer in layers[:-number] if number < 0 else layers[-number:]:
        modules = {name: module for name, module in layer.named_modules() if ".lora_" not in name}
        if shape.name_module_trainable == "mlp":
            found = ["mlp"] if "mlp" in modules else []
        else:
            wanted = ("query_key_value", "qkv_proj", "q_proj", "k_proj", "v_proj")
            found = [name for name in modules if name.rsplit(".", 1)[-1] in wanted]
        if not found:
            raise InputError(
                f"name_module_trainable: {type(causal).__name__} has no {shape.name_module_trainable} in its layers, "
                f"but {sorted(name for name in modules if name and '.' not in name)}"
            )
        names += [
            f"{layer_name}.{module}.{name}"
            for module in found
            for name, _ in layer.get_submodule(module).named_parameters()
            if ".lora_" not in f".{name}"
        ]
    return names


def method_of(folder: Path) -> Method:
    """By which method the adapter or model in `folder` was trained.

    Raises:
        InputError: it holds none.
    """
    if (folder / "adapter_config.json").exists():
        return "lora"
    if (folder / WEIGHTS_NAME).exists():
        return "freeze"
    if prefix.is_prefix(folder):
        return "p_tuning"
    if (folder / "config.json").exists():
        return "full"
    raise InputError(
        f"{folder}: no adapter; looked for adapter_config.json (LoRA), {WEIGHTS_NAME} (freeze), a prefix encoder's "
        "weights (P-Tuning v2) and config.json (a whole model)"
    )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require a gradient, by name; of tied ones the first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def finish(model: Tunable, method: Method) -> None:
    """Make a trained model what will be loaded: weights in the dtype of old, PiSSA as an ordinary LoRA."""
    if isinstance(model, PeftModel) and method == "lora":
        pissa.to_lora(model)
    elif method in ("freeze", "full"):
        causal = causal_lm(model)
        for parameter in trained_parameters(causal).values():
            parameter.data = parameter.data.to(loaded_dtype(causal))


def loaded_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that `model` was loaded in, also while what is trained of it is float32."""
    return model.config.dtype if isinstance(model.config.dtype, torch.dtype) else model.dtype


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights of method freeze, by the names that they have in the bare model."""
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that `write_weights` wrote, by name."""
    return load_file(folder / WEIGHTS_NAME)


@torch.no_grad()
def apply_weights(model: Tunable, folder: Path) -> list[str]:
    """Copy the weights that method freeze wrote to `folder` into `model`; returns their names.

    Raises:
        InputError: the model is quantised, or other than the one they belong to.
    """
    causal = causal_lm(model)
    if getattr(causal, "is_quantized", False):
        raise InputError(f"{folder}: trained weights cannot take the place of quantised ones")
    weights = read_weights(folder)
    parameters = {plain_name(name): parameter for name, parameter in causal.named_parameters()}
    for name, weight in weights.items():
        if name not in parameters or parameters[name].shape != weight.shape:
            raise InputError(f"{folder}: made for another model: {type(causal).__name__} has no such {name}")
        parameters[name].copy_(weight)
    return list(weights)


def apply(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put what `folder` holds under everything that comes later, frozen.

    LoRA is merged into the weights, on a quantised model it stays beside them; a prefix always does.
    """
    method = method_of(folder)
    if method == "full":
        raise InputError(f"{folder}: a whole model, which stands on nothing: give it as the model itself")
    if method == "p_tuning":
        prefix.attach_prefix(model, prefix.read_prefix(model, folder))
    elif method == "freeze":
        apply_weights(model, folder)
    else:
        adapted = adapters.load_lora(model, folder, name=f"below_{len(adapters.active_loras(model))}")
        model = adapted.get_base_model() if getattr(model, "is_quantized", False) else adapted.merge_and_unload()
    return model
