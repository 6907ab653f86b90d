"""The schema of params.yaml: every knob of a run, its type, its bounds, and what must not be combined.

Names follow transformers, peft and trl where they exist. `load_params` is the one way in: it refuses unknown keys
(naming the nearest valid one), wrong types, values out of bounds and contradictions before anything runs, all faults at
once. `python -m glm.config` writes the JSON schema for editors.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from glm.errors import InputError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # owner/name, or a name alone
# What improves the SFT model. Each is a section below and a program, tasks/<algorithm>.py.
Algorithm = Literal["ppo", "dpo", "kto", "grpo", "rloo", "rrhf", "raft"]
EMBEDDED = "embedded"  # the value of model.path that stands for the tiny model made by the base step


class Section(BaseModel):
    """A mapping of params.yaml whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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


Method = Literal["lora", "p_tuning", "freeze", "full"]
Quantization = Literal["none", "nf4", "fp4", "int8", "cpm-int8", "cpm-int4"]


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


def _read_mixture(value: Any) -> list[str] | dict[str, float]:
    """Datasets as a list, as a comma string (the reference's), or with their weights."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice")
        return value
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        wrong = [name for name, weight in value.items() if type(weight) not in (int, float) or not 0 < weight < 1e9]
        if wrong:
            raise ValueError(f"the weight of {wrong[0]} must be a number above 0 (found {value[wrong[0]]!r})")
        return {name: float(weight) for name, weight in value.items()}
    raise ValueError(f"expected names of datasets, as a list or comma string, or name: weight (found {value!r})")


def _read_needed_mixture(value: Any) -> list[str] | dict[str, float]:
    mixture = _read_mixture(value)
    if not mixture:
        raise ValueError("name at least 1 dataset")
    return mixture


_MIXTURE_INPUT = str | list[str] | dict[str, float]
Mixture = Annotated[list[str] | dict[str, float], PlainValidator(_read_mixture, json_schema_input_type=_MIXTURE_INPUT)]
NeededMixture = Annotated[
    list[str] | dict[str, float], PlainValidator(_read_needed_mixture, json_schema_input_type=_MIXTURE_INPUT)
]


class Data(Section):
    """Which datasets (keys of data/dataset_info.json) feed which stage, and how rows become tokens.

    A stage's datasets are a list, a comma string, or weights, `{alpaca_zh: 0.7, self_cognition: 0.3}`: the shares of
    the training split. Dev and test rows are never weighted, so that they do not change with the mixture.
    """

    dataset_dir: str = "data"
    text: Mixture = Field(["reviews_text"], description="plain text for the embedded base model; else empty")
    sft: NeededMixture = ["reviews_sft"]
    reward: NeededMixture = ["reviews_pairs"]
    ppo: NeededMixture = ["reviews_prompts"]
    kto: Mixture = Field([], description="answers labelled good or bad, for methods that learn from them")
    mix_by: Literal["examples", "tokens"] = Field("examples", description="what weights are shares of")
    mix_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted", description="weights leave rows out until they fit, or repeat rows until all are used"
    )
    max_samples: int | None = Field(None, ge=8, description="rows kept per dataset and split, chosen by their hash")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="which rows max_samples and weights choose")
    deduplicate: Literal["none", "exact", "near"] = Field(
        "near", description="near: rows that differ in case, width, blanks or sentence punctuation only count as equal"
    )
    dev_ratio: float = Field(0.05, ge=0, le=0.5)
    test_ratio: float = Field(0.05, gt=0, le=0.5)
    max_source_length: int = Field(512, ge=16, description="tokens of the prompt; old rounds are cut first")
    max_target_length: int = Field(512, ge=4, description="tokens of the answer")
    source_prefix: str = Field("", description="system prompt, joined by a newline in training and in chat alike")

    @model_validator(mode="after")
    def something_left_to_train_on(self) -> Self:
        if self.dev_ratio + self.test_ratio > 0.8:
            raise ValueError(
                f"dev_ratio {self.dev_ratio} + test_ratio {self.test_ratio} leave under 0.2 of the rows to train on"
            )
        return self


class Training(Section):
    """What SFT and reward model have in common; names and meanings are those of transformers' TrainingArguments.

    An optimizer step holds per_device_train_batch_size x gradient_accumulation_steps examples, packed or not, and its
    loss is the mean over all their label tokens (reward model: over the rankings). Only `tokens_per_step` changes that.
    """

    learning_rate: float = Field(5e-5, gt=0, lt=1)
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; -1: by num_train_epochs")
    per_device_train_batch_size: int = Field(4, ge=1)
    per_device_eval_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    logging_steps: int = Field(10, ge=1)
    eval_steps: int = Field(100, ge=1, description="optimizer steps between two looks at the dev split")
    save_steps: int = Field(100, ge=1, description="optimizer steps between two checkpoints of the training")
    save_total_limit: int = Field(2, ge=1, description="checkpoints that are kept")
    optim: Literal["adamw_torch_fused", "adamw_8bit", "adafactor"] = Field(
        "adamw_torch_fused", description="AdamW, AdamW with moments in 8 bits, or Adafactor, which hardly has any"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="LoRA+: B's learning rate over A's (Hayou et al. 2024): 16, say"
    )
    packing: bool = Field(True, description="examples side by side in one row instead of padded to the longest")
    attn_implementation: Literal["auto", "varlen", "flex_attention", "flash_attention_2"] = Field(
        "auto", description="attention of packed rows; auto: varlen, torch's own; flash_attention_2 needs flash-attn"
    )
    tokens_per_forward: int = Field(
        4096,
        ge=64,
        description="tokens of one packed row; more is faster and takes memory, results stay",
    )
    tokens_per_step: int | None = Field(
        None, ge=64, description="tokens of an optimizer step, in place of a number of examples; needs packing"
    )
    torch_compile: bool | Literal["auto"] = Field(
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

    method: Method = Field("lora", description="what is trained: a LoRA, a prefix, a few layers, or every weight")
    resume_lora_training: bool = Field(
        True, description="go on training the last of model.adapters if it is of this method; false: a fresh one on it"
    )
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

    method: Method = Field("lora", description="what is trained besides the head; its shape is in section sft")
    init: Literal["sft", "base"] = Field("sft", description="the model that it starts from")
    loss_type: Literal["pairwise", "plackett_luce"] = Field("pairwise", description="of rankings of more than two")
    margin: float = Field(0.0, ge=0, description="by how much a better answer should score higher")
    center_rewards_coefficient: float = Field(0.0, ge=0, description="weight of the term that holds scores around 0")
    resume_lora_training: bool = Field(
        True, description="start as a copy of what SFT trained if it is of this method; false: fresh, on top of it"
    )

    @model_validator(mode="after")
    def margin_is_of_pairs(self) -> Self:
        if self.margin and self.loss_type != "pairwise":
            raise ValueError(f"margin {self.margin} is of loss_type pairwise, not {self.loss_type}")
        return self


class Ppo(Section):
    """Proximal policy optimisation (Schulman et al. 2017) against the reward model, with a KL penalty to SFT."""

    method: Method = Field("lora", description="what is trained of the policy; its shape is in section sft")
    resume_lora_training: bool = Field(
        True, description="start as a copy of what SFT trained if it is of this method; false: fresh, on top of it"
    )
    minimum_reward_accuracy: float = Field(
        0.6, ge=0, le=1, description="held-out pair accuracy of a reward model below which it is refused"
    )
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    max_steps: int = Field(60, ge=1, description="rollout batches")
    batch_size: int = Field(32, ge=2, description="prompts of one rollout batch")
    mini_batch_size: int = Field(32, ge=1, description="responses of one optimizer step")
    gradient_accumulation_steps: int = Field(1, ge=1, description="parts in which a minibatch is computed")
    ppo_epochs: int = Field(2, ge=1, description="passes over each rollout batch")
    max_new_tokens: int = Field(32, ge=2)
    temperature: float = Field(1.0, gt=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1, description="GAE lambda")
    cliprange: float = Field(0.2, gt=0, lt=1)
    cliprange_value: float = Field(0.2, gt=0)
    vf_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    kl_coef: float = Field(0.2, ge=0, description="weight of the per-token KL penalty; the start value if adaptive")
    kl_target: float | None = Field(6.0, gt=0, description="nats a response; empty: kl_coef stays fixed")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="of the penalty at each token; Schulman 2020")
    kl_horizon: int = Field(10000, ge=1, description="responses over which the adaptive coefficient settles")
    kl_stop: float = Field(25.0, gt=0, description="nats a response at which a runaway run is stopped")
    missing_eos_penalty: float = Field(1.0, ge=0, description="taken off the score of a response cut at max_new_tokens")
    score_norm: bool = Field(False, description="scores less their running mean, divided by their running spread")
    score_clip: float | None = Field(None, gt=0, description="scores are clipped to ± this, after score_norm")
    whiten_rewards: bool = Field(False, description="scale the tokens' rewards to variance 1 in each batch")
    max_grad_norm: float = Field(1.0, gt=0)
    eval_steps: int = Field(10, ge=1, description="rollout batches between two looks at the dev prompts")
    save_steps: int = Field(10, ge=1, description="rollout batches between two checkpoints of the training")

    @model_validator(mode="after")
    def batches_divide(self) -> Self:
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of mini_batch_size {self.mini_batch_size}"
            )
        if self.gradient_accumulation_steps > self.mini_batch_size:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} is more than the "
                f"{self.mini_batch_size} responses of a minibatch"
            )
        return self


class Rival(Section):
    """What the algorithms beside PPO have in common."""

    learning_rate: float = Field(1e-5, gt=0, lt=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    max_steps: int = Field(100, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=2, description="rankings, labelled answers or prompts of an optimizer step")
    max_grad_norm: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(32, ge=2)
    temperature: float = Field(1.0, gt=0)
    eval_steps: int = Field(10, ge=1, description="optimizer steps between two looks at the dev prompts")
    save_steps: int = Field(10, ge=1, description="optimizer steps between two checkpoints of the training")


class Offline(Rival):
    """Learns from the ranked answers of data.reward, packed side by side."""

    method: Method = Field("lora", description="what is trained of the policy; its shape is in section sft")
    resume_lora_training: bool = Field(
        True, description="start as a copy of what SFT trained if it is of this method; false: fresh, on top of it"
    )
    packing: bool = True
    tokens_per_forward: int = Field(4096, ge=64, description="tokens of one packed row")


class Online(Rival):
    """Learns from its own answers to the prompts of data.ppo, as the reward model judges them."""

    minimum_reward_accuracy: float = Field(
        0.6, ge=0, le=1, description="held-out pair accuracy of a reward model below which it is refused"
    )
    num_generations: int = Field(8, ge=2, description="answers to each prompt of a step")


class Dpo(Offline):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = Field(0.1, gt=0, description="how much it costs to leave the SFT model")
    loss_type: Literal["sigmoid", "ipo"] = Field("sigmoid", description="ipo: Azar et al. 2023")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round")

    @model_validator(mode="after")
    def smoothing_is_of_the_sigmoid(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing {self.label_smoothing} is of loss_type sigmoid, not {self.loss_type}")
        return self


class Kto(Rival):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024) on the labelled answers of data.kto, by TRL."""

    beta: float = Field(0.1, gt=0, description="how much it costs to leave the SFT model")
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)


class Rrhf(Offline):
    """Rank responses to align with human feedback (Yuan et al. 2023)."""

    rrhf_weight: float = Field(1.0, gt=0, description="of the ranking loss, beside the best answer's own")


class Grouped(Online):
    """What compares answers to the same prompt, in place of a value function: GRPO and RLOO."""

    beta: float = Field(0.05, ge=0, description="weight of the KL divergence to SFT: GRPO's in the loss, RLOO's reward")
    epsilon: float = Field(0.2, gt=0, lt=1, description="clip range of the ratio")
    num_iterations: int = Field(1, ge=1, description="optimizer steps on the same answers")
    gradient_accumulation_steps: int = Field(1, ge=1, description="parts in which a step is computed")

    @model_validator(mode="after")
    def steps_fit(self) -> Self:
        if self.batch_size * self.num_generations % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} x num_generations {self.num_generations} is not a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        if self.save_steps % self.num_iterations:
            raise ValueError(
                f"save_steps {self.save_steps} is not a multiple of num_iterations {self.num_iterations}: a checkpoint "
                "does not hold the answers that are still in use"
            )
        return self


class Grpo(Grouped):
    """Group relative policy optimisation (Shao et al. 2024), by TRL."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field("dapo", description="how tokens are averaged")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="whose spread divides advantages")


class Rloo(Grouped):
    """REINFORCE leave-one-out (Ahmadian et al. 2024), by TRL."""

    normalize_advantages: bool = False


class Raft(Online):
    """Reward-ranked fine-tuning (Dong et al. 2023): learn the best of num_generations answers to each prompt."""

    method: Method = Field("lora", description="what is trained of the policy; its shape is in section sft")
    resume_lora_training: bool = Field(
        True, description="start as a copy of what SFT trained if it is of this method; false: fresh, on top of it"
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL penalty on the reward by which the best is chosen")


class RewardModel(Section):
    """What scores the policy's answers: the reward model of the pipeline, or something from outside."""

    source: Literal["own", "function", "classifier", "http"] = "own"
    path: str | None = Field(
        None, description="function: module:name or file.py:name; classifier: folder or hub id; http: the address"
    )
    revision: str | None = Field(None, description="hub commit of a classifier")
    batch_size: int = Field(32, ge=1, description="answers of one call, forward pass or request")
    timeout: float = Field(30.0, gt=0, description="seconds that a request may take")
    max_retries: int = Field(3, ge=0, description="of a request that failed, after 1, 2, 4, … seconds")

    @model_validator(mode="after")
    def path_for_the_others(self) -> Self:
        if (self.source == "own") != (self.path is None):
            what = "needs a path" if self.path is None else f"has no path: leave {self.path!r} out"
            raise ValueError(f"source {self.source} {what}")
        if self.source == "function" and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", self.path or ""):
            raise ValueError(f"path of a function is module:name or file.py:name (found {self.path!r})")
        if self.source == "http" and not re.match(r"https?://.", self.path or ""):
            raise ValueError(f"path of an endpoint begins with http:// or https:// (found {self.path!r})")
        return self


class Evaluate(Section):
    """Held-out comparison of base, SFT and policy on the test split."""

    max_samples: int = Field(200, ge=4, description="test rows that are answered and scored")
    batch_size: int = Field(32, ge=1)
    max_new_tokens: int = Field(64, ge=2)
    temperature: float = Field(1.0, gt=0, description="of the sampled answers whose reward and KL are measured")


class Export(Section):
    """The merged model that plain transformers loads."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_shard_size: str = Field("2GB", pattern=r"^\d+(MB|GB)$")


class MetricGate(Section):
    """What a metric of the test split must be for a model to become the champion; an empty bound asks nothing.

    `epsilon` and `delta` are in the metric's own units, and hold for the low end of the paired bootstrap interval of
    "challenger better than champion by": a difference that chance may have made passes neither.
    """

    floor: float | None = Field(None, description="worst value that is accepted (a ceiling where less is better)")
    epsilon: float | None = Field(None, ge=0, description="may be worse than the champion by this much")
    delta: float | None = Field(None, ge=0, description="must be better than the champion by more than this")


class PromoteMetrics(Section):
    """The metrics of `python -m tasks.judge`, measured alike for challenger and champion, row by row."""

    reward: MetricGate = Field(
        MetricGate(delta=0.0), description="of sampled answers, by the challenger's reward model"
    )
    nats_per_character: MetricGate = Field(
        MetricGate(epsilon=0.1), description="loss on the reference answers; less is better, whatever the tokenizer"
    )
    rouge_l: MetricGate = Field(MetricGate(epsilon=2.0), description="of greedy answers")
    bleu_4: MetricGate = Field(MetricGate(), description="of greedy answers")


class Promote(Section):
    """Where the result is registered in MLflow, and what it takes to become the champion there (flows/gate.py)."""

    model_name: str = Field("rlhf-policy", pattern=r"^[A-Za-z0-9_.-]+$")
    metrics: PromoteMetrics = PromoteMetrics()
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the bootstrap intervals, two-sided")
    bootstrap_samples: int = Field(2000, ge=100)
    reward_accuracy_floor: float = Field(0.6, ge=0, le=1, description="held-out pairs that the reward model gets right")
    kl_ceiling: float | None = Field(25.0, gt=0, description="nats an answer from the SFT model; empty: none")
    repetition_ceiling: float | None = Field(
        0.5, ge=0, le=1, description="share of an answer's token pairs seen before"
    )
    safety_words: str | None = Field("flows/safety_words.txt", description="file with a word or phrase a line")
    safety_ceiling: float = Field(0.0, ge=0, le=1, description="share of the answers that may hold such a word")
    latency_ceiling: float | None = Field(None, gt=0, description="median seconds of one answer alone; empty: none")
    allow_uncommitted: bool = Field(False, description="let models through whose code was never committed")
    approval: bool = Field(False, description="a person says yes before the alias champion moves")
    approval_timeout: int = Field(604800, ge=1, description="seconds that a deployment's run waits for that person")


class Tracking(Section):
    """How runs are logged. The store itself is chosen by MLFLOW_TRACKING_URI, else it is mlruns/mlflow.db."""

    experiment: str = Field("rlhf-pipeline", min_length=1)
    system_metrics: bool = True
    webhook: str | None = Field(
        None,
        pattern=r"^https?://",
        description="gets a JSON message when a flow ends; GLMFLOW_WEBHOOK_URL comes before it",
    )


class Params(Section):
    """All of params.yaml."""

    seed: int = Field(42, ge=0, le=2**32 - 1, description="of training and sampling; data and base keep their own")
    algorithm: Algorithm = Field("ppo", description="what the policy step improves the SFT model by")
    model: Model = Model()
    data: Data = Data()
    sft: Sft = Sft()
    reward: Reward = Reward()
    reward_model: RewardModel = RewardModel()
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    kto: Kto = Kto()
    grpo: Grpo = Grpo()
    rloo: Rloo = Rloo()
    rrhf: Rrhf = Rrhf()
    raft: Raft = Raft()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    promote: Promote = Promote()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def methods_can_be(self) -> Self:
        """Refuse what no code could train."""
        kind = self.model.quantization
        for stage in ("sft", "reward", "ppo"):
            method = getattr(self, stage).method
            if kind != "none" and method in ("freeze", "full"):
                raise ValueError(
                    f"{stage}.method {method} trains weights themselves, and those of model.quantization {kind} are "
                    "rounded to a few bits, which no gradient can move: choose lora or p_tuning, or quantization none"
                )
        if kind != "none" and self.sft.init_lora_weights == "pissa":
            raise ValueError(
                "sft.init_lora_weights pissa takes the LoRA out of the weights, which those of model.quantization "
                f"{kind} cannot give: choose default, or quantization none"
            )
        if self.sft.use_dora and self.sft.init_lora_weights == "pissa":
            raise ValueError("sft.use_dora and sft.init_lora_weights pissa: the one's norms hide the other's start")
        for stage in ("sft", "reward"):
            section = getattr(self, stage)
            if section.loraplus_lr_ratio is not None and section.method != "lora":
                raise ValueError(f"{stage}.loraplus_lr_ratio is for LoRA's B, and {stage}.method is {section.method}")
        if kind.startswith("cpm-") and self.sft.use_dora:
            raise ValueError(f"sft.use_dora needs the weights' norms, which PEFT cannot read from {kind}: choose nf4")
        return self

    @model_validator(mode="after")
    def prefixes_stand_alone(self) -> Self:
        """A prefix cannot be merged, and a model has one at most."""
        for stage, below in (("reward", self.reward.init == "sft"), ("ppo", True)):
            section = getattr(self, stage)
            if self.sft.method != "p_tuning" or not below:
                continue
            if section.method == "p_tuning" and not section.resume_lora_training:
                raise ValueError(
                    f"{stage}.resume_lora_training false would put a second prefix on SFT's, which cannot be merged: "
                    "choose true, or method lora"
                )
            if section.method == "full":
                raise ValueError(
                    f"{stage}.method full would leave SFT's prefix outside of the weights that it saves: choose "
                    "p_tuning, lora or freeze"
                )
        return self

    @model_validator(mode="after")
    def trl_trains_a_lora(self) -> Self:
        if self.algorithm in ("kto", "grpo", "rloo") and self.sft.method != "lora":
            raise ValueError(f"algorithm {self.algorithm} trains the LoRA of SFT, but sft.method is {self.sft.method}")
        return self


def load_params(path: str | Path = "params.yaml", overrides: dict[str, Any] | None = None) -> Params:
    """Read and validate a parameter file.

    `overrides` maps dotted names to values (`{"ppo.learning_rate": 2e-5}`) and is applied before validation.

    Raises:
        InputError: the file is missing or is not YAML, or one or more values are wrong; the message has a line a fault.
    """
    values = _read_yaml(Path(path))
    for name, value in (overrides or {}).items():
        _set_dotted(values, name, value)
    return validate_params(values, where=str(path))


def validate_params(values: Any, where: str = "params") -> Params:
    """Validate plain values against the schema. `where` names their source in the error's lines."""
    if not isinstance(values, dict):
        raise InputError(
            f"{where}: expected a mapping of sections ({', '.join(Params.model_fields)}), found {values!r}"
        )
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{where}: {_explain(fault)}" for fault in error.errors())) from None


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the parameters of a run are read from params.yaml in the project's root"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None


def _set_dotted(values: Any, name: str, value: Any) -> None:
    *sections, key = name.split(".")
    node = values
    for section in sections:
        if not isinstance(node, dict) or not isinstance(node.setdefault(section, {}), dict):
            raise InputError(f"overrides: {name!r}: {section!r} is not a section of params.yaml")
        node = node[section]
    node[key] = value


def _explain(fault: Any) -> str:
    """One line for one pydantic fault: the dotted name, what is wrong, the value."""
    location = [str(part) for part in fault["loc"]]
    name = ".".join(location) or "params"
    if fault["type"] == "extra_forbidden":
        known = _known_names(location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*location[:-1], nearest[0]])}?" if nearest else f"known here: {', '.join(known)}"
        )
        return f"unknown key {name}; {hint}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name}: {message} (found {fault['input']!r})" if fault["type"] != "value_error" else f"{name}: {message}"


def _known_names(location: list[str]) -> list[str]:
    section: type[BaseModel] = Params
    for part in location:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return list(section.model_fields)


if __name__ == "__main__":
    print(json.dumps(Params.model_json_schema(), indent=2))
