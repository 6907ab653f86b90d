"""PiSSA (Meng et al. 2024): a LoRA that starts as the largest singular values of the weights, and ends as any other.

PEFT takes the start out of the weights, W = W_rest + s B0 A0, so that W_rest + s B A is trained. An adapter that is to
stand on the model as it was published, beside others, must be a change of W: s (B A - B0 A0), a LoRA of twice the rank.
"""

import dataclasses
import math

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

START = "pissa_start"  # the frozen, inactive adapter that keeps A0 and B0


@torch.no_grad()
def remember_start(model: PeftModel, name: str = "default") -> None:
    """Keep a copy of the adapter `name` as it starts."""
    model.add_adapter(START, dataclasses.replace(model.peft_config[name], init_lora_weights=True))
    for layer in _layers(model):
        layer.lora_A[START].weight.copy_(layer.lora_A[name].weight)
        layer.lora_B[START].weight.copy_(layer.lora_B[name].weight)
        layer.lora_A[START].requires_grad_(False)
        layer.lora_B[START].requires_grad_(False)


@torch.no_grad()
def to_lora(model: PeftModel, name: str = "default") -> None:
    """Give the model its own weights back, and make the adapter `name` a change of them. Nothing for other LoRAs."""
    if START not in model.peft_config:
        return
    config: LoraConfig = model.peft_config[name]
    trained = {}
    for layer in _layers(model):
        layer.get_base_layer().weight += layer.get_delta_weight(START)
        down = torch.cat([layer.lora_A[name].weight, layer.lora_A[START].weight])
        up = torch.cat([layer.lora_B[name].weight, -layer.lora_B[START].weight], dim=1)
        trained[layer] = down, up
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    wide = dataclasses.replace(config, r=2 * config.r, lora_alpha=alpha, init_lora_weights=True)
    model.delete_adapter(START)
    model.delete_adapter(name)
    model.add_adapter(name, wide)
    model.set_adapter(name)
    for layer, (down, up) in trained.items():
        layer.lora_A[name].weight.copy_(down)
        layer.lora_B[name].weight.copy_(up)


def _layers(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
