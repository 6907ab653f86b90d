"""The linear maps of transformers' Glm layers, as they are or under LoRA."""

from peft.tuners import lora
from torch import nn


def linears_of(layer: nn.Module) -> list[nn.Module]:
    """q, k, v, out, gate_up and down of a decoder layer."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_up_proj,
        mlp.down_proj,
    ]


def base_of(linear: nn.Module) -> nn.Linear:
    """The linear itself, without PEFT's wrapper."""
    return linear.base_layer if isinstance(linear, lora.Linear) else linear


def is_plain(linear: nn.Module) -> bool:
    """Whether it is an unquantised linear, bare or under LoRAs that are nothing but A and B beside it."""
    return type(linear) is nn.Linear or (
        type(linear) is lora.Linear
        and type(linear.base_layer) is nn.Linear
        and not (linear.merged or linear.lora_variant or any(linear.lora_bias.values()))
    )


def active_loras(linear: nn.Module) -> list[str]:
    """Names of the LoRAs that a forward pass uses here."""
    if not isinstance(linear, lora.Linear) or linear.disable_adapters:
        return []
    return [name for name in linear.active_adapters if name in linear.lora_A]
