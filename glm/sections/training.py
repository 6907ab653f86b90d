"""Sections `sft` and `reward`: what is trained, for how long, and in which form."""

from typing import Literal, Self

from pydantic import Field, model_validator

from glm.sections.section import Section

Method = Literal["lora", "p_tuning", "freeze", "full"]


class Tuned(Section):
    """What a stage trains of the model. The shapes of all stages are in section `sft`."""

    method: Method = Field("lora", description="what is trained: a LoRA, a prefix, a few layers, or every weight")
    resume_lora_training: bool = Field(
        True,
        description="start as a copy of what the stage below trained (SFT: of the last of model.adapters) if it is of "
        "this method; false: fresh, on top of it",
    )


class Training(Tuned):
    """What SFT and reward model have in common; names and meanings are those of transformers' TrainingArguments.

    An optimizer step holds per_device_train_batch_size x gradient_accumulation_steps examples, packed or not and over
    all processes, and its loss is the mean over all their label tokens (reward model: over the rankings). Only
    `tokens_per_step` changes that.
    """

    learning_rate: float = Field(5e-5, gt=0, lt=1)
    num_train_epochs: float = Field(3.0, gt=0, le=10_000)
    max_steps: int = Field(-1, ge=-1, le=10**9, description="optimizer steps; -1: by num_train_epochs")
    per_device_train_batch_size: int = Field(4, ge=1)
    per_device_eval_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, gt=0)
    logging_steps: int = Field(10, ge=1)
    eval_steps: int = Field(100, ge=1, description="optimizer steps between two looks at the dev split")
    save_steps: int = Field(100, ge=1, description="optimizer steps between two checkpoints of the training")
    save_total_limit: int = Field(2, ge=1, description="checkpoints that are kept")
    optim: Literal["adamw_torch_fused", "adamw_8bit", "adafactor"] = Field(
        "adamw_torch_fused", description="AdamW, AdamW with moments in 8 bits, or Adafactor, which hardly has any"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, le=10_000, description="LoRA+: B's learning rate over A's (Hayou et al. 2024): 16, say"
    )
    packing: bool = Field(True, description="examples side by side in one row instead of padded to the longest")
    attn_implementation: Literal["auto", "varlen", "flex_attention", "flash_attention_2"] = Field(
        "auto", description="attention of packed rows; auto: varlen, torch's own; flash_attention_2 needs flash-attn"
    )
    tokens_per_forward: int = Field(
        4096,
        ge=64,
        le=2**24,
        description="tokens of one packed row; more is faster and takes memory, results stay",
    )
    tokens_per_step: int | None = Field(
        None,
        ge=64,
        le=2**30,
        description="tokens of an optimizer step, in place of examples; needs packing",
    )
    fused_layers: bool = Field(
        True,
        description="packed Glm layers under a LoRA without dropout in fewer, cheaper steps, the last one only where "
        "the loss looks",
    )
    torch_compile: Literal[True, False, "auto"] = Field(
        "auto", description="compile the decoder layers; auto: on a GPU, packed, if the run is long enough to gain"
    )
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto", description="compute activations again in the backward pass; auto: as little as fits the GPU's memory"
    )

    @model_validator(mode="after")
    def some_steps(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps 0 would train nothing: -1 means as num_train_epochs says")
        return self

    @model_validator(mode="after")
    def steps_of_whole_rows(self) -> Self:
        if self.tokens_per_step is None:
            return self
        if not self.packing:
            raise ValueError(f"tokens_per_step {self.tokens_per_step} needs packing: true")
        if self.tokens_per_step > self.tokens_per_forward and self.tokens_per_step % self.tokens_per_forward:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} is not a multiple of tokens_per_forward "
                f"{self.tokens_per_forward}"
            )
        return self


class Sft(Training):
    """Supervised fine-tuning on prompt and answer; the loss counts answers only.

    The shapes of LoRA, prefix and trained layers are given here for the whole pipeline. Reward model and policy start
    as copies of what SFT trained where their method is the same, and else fresh, in these shapes, on top of it.
    """

    lora_rank: int = Field(8, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    lora_target: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="module names; query_key_value stands for q/k/v_proj on models that split them"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    use_dora: bool = Field(False, description="train the weights' norms besides (Liu et al. 2024)")
    init_lora_weights: Literal["default", "pissa"] = Field(
        "default", description="pissa: start from the weights' largest singular values (Meng et al. 2024)"
    )
    pre_seq_len: int = Field(64, ge=1, description="p_tuning: trained keys and values before each layer's own")
    prefix_projection: bool = Field(False, description="p_tuning: make them by a small network")
    num_layer_trainable: int = Field(3, description="freeze: this many last layers are trained; negative: first layers")
    name_module_trainable: Literal["mlp", "qkv"] = Field("mlp", description="freeze: what is trained of a layer")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="noise on embeddings (Jain et al. 2023): 5, say")

    @model_validator(mode="after")
    def some_layers(self) -> Self:
        if self.num_layer_trainable == 0:
            raise ValueError("num_layer_trainable 0 would train nothing: 3 means the last three layers, -3 the first")
        return self


class Reward(Training):
    """Pairwise reward model (Ouyang et al. 2022, eq. 1) and its scalar head."""

    init: Literal["sft", "base"] = Field("sft", description="the model that it starts from")
    loss_type: Literal["pairwise", "plackett_luce"] = Field("pairwise", description="of rankings of more than two")
    margin: float = Field(0.0, ge=0, le=1000, description="by how much a better answer should score higher")
    center_rewards_coefficient: float = Field(
        0.0, ge=0, le=1000, description="weight of the term that holds scores around 0"
    )
    share_prompt: bool = Field(True, description="packed answers of a ranking share the computation of their prompt")

    @model_validator(mode="after")
    def margin_is_of_pairs(self) -> Self:
        if self.margin and self.loss_type != "pairwise":
            raise ValueError(f"margin {self.margin} is of loss_type pairwise, not {self.loss_type}")
        return self
