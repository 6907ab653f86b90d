"""Sections of what becomes of a result: evaluation, export, promotion, tracking."""

from typing import Literal, Self

from pydantic import Field, model_validator

from glm.sections.section import Section


class Evaluate(Section):
    """Held-out comparison of base, SFT and policy on the test split."""

    max_samples: int = Field(200, ge=4, description="test rows that are answered and scored")
    batch_size: int = Field(32, ge=1)
    max_new_tokens: int = Field(64, ge=2)
    temperature: float = Field(1.0, gt=0, description="of the sampled answers whose reward and KL are measured")


class Export(Section):
    """The folder that the result becomes for others: by default a merged model that plain transformers loads."""

    what: Literal["merged", "adapter"] = Field(
        "merged", description="the whole model, or what was trained alone, to be put on the same base"
    )
    layout: Literal["transformers", "authors"] = Field(
        "transformers", description="authors: names and files as ChatGLM's authors publish them; cpm-… is always theirs"
    )
    quantization: Literal["none", "nf4", "cpm-int8", "cpm-int4"] = Field(
        "none", description="of the export: bitsandbytes' nf4, or the authors' (cpm-…)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_shard_size: str = Field("2GB", pattern=r"^[1-9]\d*(MB|GB)$")
    push_to_hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="owner/name on the hub of what becomes the champion; empty: none",
    )
    private: bool = Field(True, description="a model that is new on the hub is seen by its owner alone")

    @model_validator(mode="after")
    def formats_fit(self) -> Self:
        if self.what == "adapter" and (self.quantization != "none" or self.layout != "transformers"):
            raise ValueError(
                f"what adapter leaves the base out, which quantization {self.quantization} and layout {self.layout} "
                "are about: choose quantization none and layout transformers, or what merged"
            )
        if self.quantization == "nf4" and self.layout == "authors":
            raise ValueError("quantization nf4 is bitsandbytes', unknown to layout authors: choose cpm-int4")
        return self


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
