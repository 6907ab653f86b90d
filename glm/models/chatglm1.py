"""ChatGLM-6B, the first generation, written against transformers 5.

A prefix language model (GLM, Du et al. 2022, https://arxiv.org/abs/2103.10360): the prompt is read in both
directions, the answer from left to right. A sequence is `prompt [gMASK] <sop> answer <eop>`, where <sop> is bos and
<eop> is eos, and every token has two positions (2-D positional encoding, section 2.3 of the paper). Module names are
those of the published checkpoints, so their weights load and save without renaming.
"""
# ruff: noqa: RUF012 (plain class attributes are how transformers is told about a model)

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

# The published code multiplies each residual by sqrt(2 * 28), the depth of ChatGLM-6B, whatever the depth of the model.
RESIDUAL_SCALE = math.sqrt(2 * 28)


@strict
class ChatGLMConfig(PreTrainedConfig):
    """Config of ChatGLM-6B with the field names of its published config.json.

    The special ids differ by 20000 between the two published vocabularies (130528 rows; 150528 rows with image tokens).
    The earlier config.json names only bos and eos; the others follow from bos, by the layout that both share.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "num_key_value_heads": "num_attention_heads",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    gmask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if "padded_vocab_size" in kwargs:
            raise ValueError(
                "padded_vocab_size belongs to ChatGLM2, ChatGLM3 or GLM-4; load it with glm.models.load_model"
            )
        if not self.position_encoding_2d:
            raise ValueError("position_encoding_2d is false; only the 2-D positions of ChatGLM-6B are known")
        if self.pad_token_id is None:
            self.pad_token_id = max(3, self.bos_token_id - 130001)
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def prefix_lm_positions(config: ChatGLMConfig, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Work out the 2-D positions of whole sequences [batch, length] -> [batch, 2, length].

    First row: 0, 1, 2 ... over the prompt, counted from the first token that is kept, then constantly the place of the
    mask token. Second row: 0 over the prompt, then 1, 2, 3 ... from bos on. The prompt ends before the first bos. The
    mask token is the first [gMASK] of the prompt, or its first [MASK] where it has no [gMASK]; the published model does
    the same. `attention_mask` [batch, length] is 1 for kept tokens; padding may stand on either side.

    Raises ValueError if a row has no bos, or no mask token before it.
    """
    is_bos = input_ids == config.bos_token_id
    context_length = is_bos.int().argmax(-1, keepdim=True)
    index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    in_context = index < context_length
    is_gmask = (input_ids == config.gmask_token_id) & in_context
    is_mask = (input_ids == config.mask_token_id) & in_context
    marker = torch.where(is_gmask.any(-1, keepdim=True), is_gmask, is_mask)
    complete = is_bos.any(-1) & marker.any(-1)
    if not complete.all():
        raise ValueError(
            f"input_ids: row {int(complete.int().argmin())} has no [gMASK] ({config.gmask_token_id}) or [MASK] "
            f"({config.mask_token_id}) followed by bos ({config.bos_token_id}); a ChatGLM-6B sequence is "
            "prompt [gMASK] bos answer"
        )
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    counted = (keep.cumsum(-1) - 1).clamp(min=0)
    mask_position = counted.gather(1, marker.int().argmax(-1, keepdim=True))
    positions = torch.where(in_context, counted, mask_position)
    block_positions = (index - context_length + 1).clamp(min=0)
    return torch.stack([positions, block_positions], dim=1)


def rotary_cos_sin(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary tables for 2-D positions [batch, 2, length] -> cos, sin [batch, 1, length, head_dim].

    Half of each head turns with the first position, half with the second. The published model keeps its inverse
    frequencies in float16 even when it runs in float32, and in a half-precision model the angles too: the weights were
    trained with them, so both roundings are kept (angles in float16 also where the model is bfloat16).
    """
    rotary_dim = head_dim // 2
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=position_ids.device) / rotary_dim
    inverse_frequencies = (1.0 / 10000**exponents).half()
    angle_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    angles = position_ids[..., None].to(angle_dtype) * inverse_frequencies.to(angle_dtype)

    def widened(table: Tensor) -> Tensor:
        return torch.cat([table[:, 0], table[:, 0], table[:, 1], table[:, 1]], dim=-1)[:, None]

    # in `dtype` first: under autocast to bfloat16, float16 cannot be concatenated
    return widened(angles.cos().to(dtype)), widened(angles.sin().to(dtype))


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [batch, heads, length, head_dim]; pairs are (i, i + head_dim/4) within each half of the head."""
    a, b, c, d = states.chunk(4, dim=-1)
    return states * cos + torch.cat([-b, a, -d, c], dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, softmax in float32. Heads [batch, heads, length, dim] -> [batch, length, heads, dim].

    The query is scaled before the product, not after: in float16 the raw scores of ChatGLM-6B can overflow.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ChatGLMAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden_states.shape
        # The rows of the fused projection are interleaved by head: [q k v] of head 0, [q k v] of head 1, ...
        heads = self.query_key_value(hidden_states).view(batch, length, -1, 3 * self.head_dim).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        query, key = apply_rotary(query, *cos_sin), apply_rotary(key, *cos_sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, is_causal=False, **kwargs
        )
        return self.dense(output.reshape(batch, length, -1)), weights


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # The residual is the scaled output of the layer norm, not its input.
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = RESIDUAL_SCALE * hidden_states + self.attention(hidden_states, **kwargs)[0]
        hidden_states = self.post_attention_layernorm(hidden_states)
        return RESIDUAL_SCALE * hidden_states + self.mlp(hidden_states)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    # A prefix mask is not expressible in one call of flash attention; flex attention gives wrong tokens on the CPU.
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The decoder stack of ChatGLM-6B.

    `attention_mask` is the usual [batch, length] with 1 = keep, padding on either side; the prefix mask and the 2-D
    positions are worked out from it and `input_ids`. `position_ids` [batch, 2, length] may be given instead; the prompt
    is then where the second row is 0.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, past_key_values)
        if past_key_values is not None:
            # What a later call needs to go on from here; beam search reorders the cache but passes position_ids.
            past_key_values.last_position_ids = position_ids[:, :, -1:]

        context_length = (position_ids[:, 1] == 0).long().cumprod(-1).sum(-1)  # 0 in a decoding step
        # position_ids are not passed on: they are not increasing, which would be taken for packed sequences.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            or_mask_function=lambda batch, head, query, key: key < context_length[batch],
        )
        cos_sin = rotary_cos_sin(position_ids, self.config.head_dim, inputs_embeds.dtype)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                cos_sin=cos_sin,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )

    def _positions(self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        if input_ids is None:
            raise ValueError("inputs_embeds needs position_ids [batch, 2, length]: special tokens cannot be seen in it")
        if cache is None or cache.get_seq_length() == 0:
            padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            return prefix_lm_positions(self.config, input_ids, padding)
        last = cache.last_position_ids
        steps = torch.arange(1, input_ids.shape[1] + 1, device=last.device)
        return torch.stack([last[:, 0].expand(-1, len(steps)), last[:, 1] + steps], dim=1)


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its output layer, which shares its weight with the embedding as in the published model."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # `input_ids` is the whole sequence so far, whose first special tokens are the prompt's: no state is carried.
        kwargs["position_ids"] = prefix_lm_positions(self.config, input_ids, attention_mask)
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    def create_masks_for_generate(self, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        # Called for caches of fixed length. The 2-D mask is kept: the prefix mask is made from it in `forward`.
        return attention_mask


class ChatGLMForSequenceClassification(GenericForSequenceClassification, ChatGLMPreTrainedModel):
    """ChatGLM-6B with a linear head on the last token that is not padding (used as reward model)."""

    base_model_prefix = "transformer"


AutoConfig.register("chatglm", ChatGLMConfig)
AutoModel.register(ChatGLMConfig, ChatGLMModel)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM)
AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification)
