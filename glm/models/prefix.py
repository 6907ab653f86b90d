"""P-Tuning v2: trained keys and values in front of every layer's own (Liu et al. 2022, https://arxiv.org/abs/2110.07602).

The prefix joins inside the attention, through transformers' attention interface, and not as a filled cache: so it is
trained with gradient checkpointing on, it costs no positions, and `generate` needs nothing special. As in the authors'
ptuning code of ChatGLM-6B and ChatGLM2-6B the prefix is not rotated, positions of real tokens do not shift, and it is
visible to every token. It works for ChatGLM-6B, Glm and other models that pass keyword arguments to that interface.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from glm.errors import InputError
from glm.files import write_json
from glm.models.chatglm1 import ChatGLMModel, eager_attention_forward
from glm.models.checkpoint import WEIGHT_FILES, Checkpoint

CONFIG_NAME = "prefix_config.json"
WEIGHTS_NAME = "prefix_encoder.safetensors"
BESIDE = "prefix"  # folder of an exported model that holds the prefix which belongs to it


class PrefixEncoder(nn.Module):
    """Holds a prefix of `num_virtual_tokens` P for `num_layers` layers with `num_heads` key/value heads of `head_dim`.

    Without projection it is a table [P, layers * 2 * heads * head_dim]. With projection a table [P, embedding_size] is
    widened by Linear(embedding_size, hidden_size), tanh, Linear(hidden_size, layers * 2 * heads * head_dim). Parameter
    names are those of the authors' prefix encoder.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        projection: tuple[int, int] | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        width = num_layers * 2 * num_heads * head_dim
        self.trans: nn.Sequential | None = None
        if projection is None:
            self.embedding = nn.Embedding(num_virtual_tokens, width)
        else:
            embedding_size, hidden_size = projection
            self.embedding = nn.Embedding(num_virtual_tokens, embedding_size)
            self.trans = nn.Sequential(nn.Linear(embedding_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, width))
        self._constant: tuple[tuple[int, ...], Tensor] | None = None

    def keys_values(self, layer: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [batch, heads, P, head_dim], in `dtype`; dropout in training.

        Each layer computes its own part from the parameters, so that a checkpointed layer can be run again alone.
        """
        width = 2 * self.num_heads * self.head_dim
        columns = slice(layer * width, (layer + 1) * width)
        states = self._columns(columns) if torch.is_grad_enabled() else self._all_columns()[:, columns]
        states = F.dropout(states[None].expand(batch, -1, -1), self.dropout, self.training).to(dtype)
        keys, values = states.view(batch, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return keys, values

    def _columns(self, columns: slice) -> Tensor:
        if self.trans is None:
            return self.embedding.weight[:, columns]
        first, tanh, last = self.trans
        return F.linear(tanh(first(self.embedding.weight)), last.weight[columns], last.bias[columns])

    def _all_columns(self) -> Tensor:
        # In generation the projection would cost more than the model: keep its result until a parameter changes.
        state = tuple(number for p in self.parameters() for number in (p._version, p.data_ptr()))
        if self._constant is None or self._constant[0] != state:
            self._constant = (state, self._columns(slice(None)))
        return self._constant[1]


def _attend_with_prefix(attend: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        prefix: PrefixEncoder,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        prefix_key, prefix_value = prefix.keys_values(module.layer_idx, key.shape[0], key.dtype)
        visible = True if attention_mask.dtype == torch.bool else 0.0
        mask = F.pad(attention_mask, (prefix_key.shape[2], 0), value=visible)
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        return attend(module, query, key, value, mask, **kwargs)

    return attention


def _whole_sdpa_mask(**kwargs: Any) -> Tensor:
    # sdpa_mask leaves out a mask that is merely causal; with a prefix in front it no longer is.
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("sdpa_prefix", _attend_with_prefix(sdpa_attention_forward))
AttentionMaskInterface.register("sdpa_prefix", _whole_sdpa_mask)
AttentionInterface.register("eager_prefix", _attend_with_prefix(eager_attention_forward))
AttentionMaskInterface.register("eager_prefix", eager_mask)


def _pass_prefix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if module.prefix_encoder is None:
        return args, kwargs
    kwargs["prefix"] = module.prefix_encoder
    mask = kwargs.get("attention_mask")
    if isinstance(module, ChatGLMModel) or kwargs.get("position_ids") is not None or mask is None or mask.dim() != 2:
        return args, kwargs
    # Left padding must not count: the prefix is not rotated, so absolute positions matter. ChatGLM-6B sees to it.
    inputs = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    length = next(tensor.shape[1] for tensor in inputs if tensor is not None)
    kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return args, kwargs


def attach_prefix(model: PreTrainedModel, encoder: PrefixEncoder) -> None:
    """Give `model` a prefix, kept as `prefix_encoder` of its base model.

    Raises InputError if it has one already, or its attention is neither sdpa nor eager.
    """
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise InputError(f"attn_implementation: {implementation!r} takes no prefix (or another one); use sdpa or eager")
    use_prefix(model, encoder.to(model.device).train(model.training))


def use_prefix(model: PreTrainedModel, encoder: PrefixEncoder | None) -> None:
    """Put `encoder` in the place of the prefix that `model` has or has not; None takes it away."""
    base = model.base_model
    if not hasattr(base, "prefix_encoder"):
        base.register_forward_pre_hook(_pass_prefix, with_kwargs=True)
    base.prefix_encoder = encoder
    implementation = model.config._attn_implementation.removesuffix("_prefix")
    model.set_attn_implementation(implementation if encoder is None else f"{implementation}_prefix")


def prefix_of(model: PreTrainedModel) -> PrefixEncoder | None:
    """The prefix of `model`."""
    return getattr(model.base_model, "prefix_encoder", None)


def is_prefix(path: Path) -> bool:
    """Whether it is a file, a folder of this project's, or a checkpoint of the authors' ptuning code."""
    if path.is_file() or (path / WEIGHTS_NAME).exists():
        return True
    has_weights = any((path / name).exists() for name in WEIGHT_FILES)
    return has_weights and any(".prefix_encoder." in name for name in Checkpoint(path).tensors)


def new_prefix(model: PreTrainedModel, num_virtual_tokens: int = 128, projection: bool = False) -> PrefixEncoder:
    """Attach a fresh float32 prefix to `model` and make it the only thing that is trained."""
    encoder = build_prefix(model, num_virtual_tokens, projection)
    attach_prefix(model, encoder)
    model.requires_grad_(False)
    return encoder.requires_grad_(True)


def build_prefix(model: PreTrainedModel, num_virtual_tokens: int, projection: bool) -> PrefixEncoder:
    """A fresh float32 prefix for `model`, not attached to it.

    The sizes of the projection are the authors': ChatGLM-6B widens from hidden_size, the later ones from the width of
    all layers' keys and values; both through hidden_size.
    """
    num_layers, num_heads, head_dim = _cache_sizes(model.config)
    hidden_size, width = model.config.hidden_size, num_layers * 2 * num_heads * head_dim
    embedding_size = hidden_size if isinstance(model.base_model, ChatGLMModel) else width
    return PrefixEncoder(
        num_virtual_tokens,
        num_layers,
        num_heads,
        head_dim,
        projection=(embedding_size, hidden_size) if projection else None,
    )


def read_prefix(model: PreTrainedModel, path: Path) -> PrefixEncoder:
    """Read a saved prefix for `model`: a folder of `write_prefix` or of the authors' ptuning code, or a file of either.

    Sizes come from the tensors' shapes. Raises InputError naming the file if there is no prefix in it, or one that was
    made for another model.
    """
    place = path / WEIGHTS_NAME if (path / WEIGHTS_NAME).exists() else path
    checkpoint = Checkpoint(place)
    tensors = {
        name.rpartition("prefix_encoder.")[2]: checkpoint.read(name).float()
        for name in checkpoint.tensors
        if "prefix_encoder." in name
    }
    checkpoint.close()
    table = tensors.get("embedding.weight")
    if table is None:
        raise InputError(f"{place}: holds no prefix encoder (no tensor prefix_encoder.embedding.weight)")
    num_layers, num_heads, head_dim = _cache_sizes(model.config)
    width = num_layers * 2 * num_heads * head_dim
    found = tensors["trans.2.weight"].shape[0] if "trans.2.weight" in tensors else table.shape[1]
    if found != width:
        raise InputError(
            f"{place}: the prefix is {found} wide, but this model needs {width} "
            f"({num_layers} layers * 2 * {num_heads} heads * {head_dim})"
        )
    projection = (table.shape[1], tensors["trans.0.weight"].shape[0]) if "trans.2.weight" in tensors else None
    settings = path / CONFIG_NAME
    dropout = json.loads(settings.read_text(encoding="utf-8"))["dropout"] if settings.exists() else 0.1
    encoder = PrefixEncoder(table.shape[0], num_layers, num_heads, head_dim, projection=projection, dropout=dropout)
    encoder.load_state_dict(tensors)
    return encoder


def write_prefix(model: PreTrainedModel, folder: Path) -> None:
    """Write the prefix of `model` into `folder`: `prefix_encoder.safetensors` (the authors' names) and a JSON file."""
    encoder = model.base_model.prefix_encoder
    tensors = {
        f"transformer.prefix_encoder.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(
        folder / CONFIG_NAME,
        {
            "num_virtual_tokens": encoder.embedding.num_embeddings,
            "prefix_projection": encoder.trans is not None,
            "dropout": encoder.dropout,
            "base_model_name_or_path": model.config.name_or_path,
        },
    )


def _cache_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, key/value heads, and the size of a head (which not every config of transformers says)."""
    head_dim = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head_dim
