"""Section `model`: the base model of a run."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from glm.sections.section import Section

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # owner/name, or a name alone
EMBEDDED = "embedded"  # the value of model.path that stands for the tiny model made by the base step
Quantization = Literal["none", "nf4", "fp4", "int8", "cpm-int8", "cpm-int4"]


class EmbeddedModel(Section):
    """The tiny ChatGLM2-shaped model and its tokenizer, trained on the reviews of the training split."""

    vocab_size: int = Field(3000, ge=512, le=8000, description="sentencepiece pieces, before the special tokens")
    hidden_size: int = Field(128, ge=16, le=1024)
    num_layers: int = Field(4, ge=1, le=24)
    num_attention_heads: int = Field(4, ge=1)
    multi_query_group_num: int = Field(2, ge=1, description="key/value heads")
    ffn_hidden_size: int = Field(344, ge=16)
    num_train_epochs: float = Field(3.0, gt=0)
    learning_rate: float = Field(4e-3, gt=0, lt=1)
    tokens_per_batch: int = Field(2048, ge=64, description="tokens of one optimizer step")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="of its weights and the order of its text")

    @model_validator(mode="after")
    def heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_attention_heads ({self.num_attention_heads}) times a "
                "multiple of 4 (half of each head is rotated, in pairs)"
            )
        if self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of multi_query_group_num "
                f"{self.multi_query_group_num}"
            )
        return self


class Model(Section):
    """The base model. Every stage reads it from models/base, which the base step makes or points to."""

    path: str = Field(EMBEDDED, min_length=1, description="'embedded', a folder, or a hub id")
    revision: str | None = Field(None, description="hub commit; recorded, and required to be able to reproduce a run")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Quantization = Field(
        "none", description="frozen weights in 4 or 8 bits: bitsandbytes (nf4, fp4, int8), or the authors' (cpm-…)"
    )
    double_quantization: bool = Field(True, description="of nf4 and fp4: the scales are quantised too")
    adapters: list[str] = Field(
        [], description="folders of adapters you trained before, applied in this order under everything"
    )
    embedded: EmbeddedModel = EmbeddedModel()

    @model_validator(mode="after")
    def revision_needs_hub(self) -> Self:
        if self.revision and self.path == EMBEDDED:
            raise ValueError("revision names a commit on the hub, but path is 'embedded': leave revision empty")
        return self
