"""Sections of the policy step: the seven algorithms, and where their reward comes from."""

import re
from math import gcd
from typing import Literal, Self

from pydantic import Field, model_validator

from glm.sections.section import Section
from glm.sections.training import Tuned

# What improves the SFT model. Each is a section below and a program, tasks/<algorithm>.py.
Algorithm = Literal["ppo", "dpo", "kto", "grpo", "rloo", "rrhf", "raft"]
LONGEST_ANSWER = 2**17  # tokens: the longest context of these models
ONLINE = ("ppo", "grpo", "rloo", "raft")  # those that learn from the policy's own answers


class Ppo(Tuned):
    """Proximal policy optimisation (Schulman et al. 2017) against the reward model, with a KL penalty to SFT."""

    minimum_reward_accuracy: float = Field(
        0.6, ge=0, le=1, description="held-out pair accuracy of a reward model below which it is refused"
    )
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    max_steps: int = Field(60, ge=1, le=10**9, description="rollout batches")
    batch_size: int = Field(32, ge=2, description="prompts of one rollout batch")
    mini_batch_size: int = Field(32, ge=1, description="responses of one optimizer step")
    gradient_accumulation_steps: int = Field(1, ge=1, description="parts in which a minibatch is computed")
    ppo_epochs: int = Field(2, ge=1, le=1000, description="passes over each rollout batch")
    max_new_tokens: int = Field(32, ge=2, le=LONGEST_ANSWER)
    temperature: float = Field(1.0, ge=0.01, le=100)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1, description="GAE lambda")
    cliprange: float = Field(0.2, gt=0, lt=1)
    cliprange_value: float = Field(0.2, gt=0, le=1e6)
    vf_coef: float = Field(0.1, ge=0, le=1000)
    entropy_coef: float = Field(0.0, ge=0, le=1000, description="weight of the entropy bonus")
    kl_coef: float = Field(0.2, ge=0, le=1000, description="weight of the KL penalty at each token; adaptive: at first")
    kl_target: float | None = Field(6.0, gt=0, description="nats a response; empty: kl_coef stays fixed")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="of the penalty at each token; Schulman 2020")
    kl_horizon: int = Field(10000, ge=1, description="responses over which the adaptive coefficient settles")
    kl_stop: float = Field(25.0, gt=0, description="nats a response at which a runaway run is stopped")
    missing_eos_penalty: float = Field(
        1.0, ge=0, le=1e6, description="taken off the score of a response cut at max_new_tokens"
    )
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

    @model_validator(mode="after")
    def coefficient_can_adapt(self) -> Self:
        if self.kl_target is None:
            return self
        if self.kl_coef == 0:
            raise ValueError(
                f"kl_coef 0 stays 0 by whatever kl_target {self.kl_target:g} multiplies it: start above 0, or leave "
                "kl_target empty"
            )
        if self.kl_horizon < self.batch_size:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is less than batch_size {self.batch_size}: a step could turn the sign "
                "of kl_coef"
            )
        return self


class Rival(Section):
    """What the algorithms beside PPO have in common."""

    learning_rate: float = Field(1e-5, gt=0, lt=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    max_steps: int = Field(100, ge=1, le=10**9, description="optimizer steps")
    batch_size: int = Field(32, ge=2, description="rankings, labelled answers or prompts of an optimizer step")
    max_grad_norm: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(32, ge=2, le=LONGEST_ANSWER)
    temperature: float = Field(1.0, ge=0.01, le=100)
    eval_steps: int = Field(10, ge=1, description="optimizer steps between two looks at the dev prompts")
    save_steps: int = Field(10, ge=1, description="optimizer steps between two checkpoints of the training")


class Offline(Rival, Tuned):
    """Learns from the ranked answers of data.reward, packed side by side."""

    packing: bool = True
    share_prompt: bool = Field(True, description="packed answers of a ranking share the computation of their prompt")
    tokens_per_forward: int = Field(4096, ge=64, le=2**24, description="tokens of one packed row")


class Online(Rival):
    """Learns from its own answers to the prompts of data.ppo, as the reward model judges them."""

    minimum_reward_accuracy: float = Field(
        0.6, ge=0, le=1, description="held-out pair accuracy of a reward model below which it is refused"
    )
    num_generations: int = Field(8, ge=2, le=1024, description="answers to each prompt of a step")


class Dpo(Offline):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = Field(0.1, gt=0, le=1000, description="how much it costs to leave the SFT model")
    loss_type: Literal["sigmoid", "ipo"] = Field("sigmoid", description="ipo: Azar et al. 2023")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round")

    @model_validator(mode="after")
    def smoothing_is_of_the_sigmoid(self) -> Self:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing {self.label_smoothing} is of loss_type sigmoid, not {self.loss_type}")
        return self


class Kto(Rival):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024) on the labelled answers of data.kto, by TRL."""

    beta: float = Field(0.1, gt=0, le=1000, description="how much it costs to leave the SFT model")
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)

    def uneven(self, processes: int) -> str | None:
        """Why so many processes cannot share a step; TRL gives each as many answers, and no fewer than two."""
        if self.batch_size % processes == 0 and self.batch_size >= 2 * processes:
            return None
        return (
            f"batch_size {self.batch_size} does not give each as many answers, and two or more: choose a multiple of "
            f"{processes}, and at least {2 * processes}"
        )


class Rrhf(Offline):
    """Rank responses to align with human feedback (Yuan et al. 2023)."""

    rrhf_weight: float = Field(1.0, gt=0, le=1e6, description="of the ranking loss, beside the best answer's own")


class Grouped(Online):
    """What compares answers to the same prompt, in place of a value function: GRPO and RLOO."""

    beta: float = Field(
        0.05, ge=0, le=1000, description="weight of the KL divergence to SFT: GRPO's in the loss, RLOO's reward"
    )
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

    def uneven(self, processes: int) -> str | None:
        """Why so many processes cannot share a step; TRL gives each as many answers of each of its parts."""
        shares = processes * self.gradient_accumulation_steps
        if self.batch_size * self.num_generations % shares == 0:
            return None
        return (
            f"batch_size {self.batch_size} x num_generations {self.num_generations}, in gradient_accumulation_steps "
            f"{self.gradient_accumulation_steps} parts, does not give each as many answers: choose a batch_size that "
            f"is a multiple of {shares // gcd(shares, self.num_generations)}"
        )


class Grpo(Grouped):
    """Group relative policy optimisation (Shao et al. 2024), by TRL."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field("dapo", description="how tokens are averaged")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="whose spread divides advantages")


class Rloo(Grouped):
    """REINFORCE leave-one-out (Ahmadian et al. 2024), by TRL."""

    normalize_advantages: bool = False


class Raft(Online, Tuned):
    """Reward-ranked fine-tuning (Dong et al. 2023): learn the best of num_generations answers to each prompt."""

    beta: float = Field(
        0.0, ge=0, le=1000, description="weight of the KL penalty on the reward by which the best is chosen"
    )


class RewardModel(Section):
    """What scores the policy's answers: the reward model of the pipeline, or something from outside."""

    source: Literal["own", "function", "classifier", "http"] = "own"
    path: str | None = Field(
        None, description="function: module:name or file.py:name; classifier: folder or hub id; http: the address"
    )
    revision: str | None = Field(None, min_length=1, description="hub commit of a classifier")
    batch_size: int = Field(32, ge=1, description="answers of one call, forward pass or request")
    timeout: float = Field(30.0, gt=0, le=3600, description="seconds that a request may take")
    max_retries: int = Field(3, ge=0, le=10, description="of a request that failed, after 1, 2, 4, … seconds")

    @model_validator(mode="after")
    def path_for_the_others(self) -> Self:
        if (self.source == "own") != (self.path is None):
            what = "needs a path" if self.path is None else f"has no path: leave {self.path!r} out"
            raise ValueError(f"source {self.source} {what}")
        if self.revision is not None and self.source != "classifier":
            raise ValueError(f"revision {self.revision!r} is of source classifier, not {self.source}")
        if self.source == "function" and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", self.path or ""):
            raise ValueError(f"path of a function is module:name or file.py:name (found {self.path!r})")
        if self.source == "http" and not re.match(r"https?://.", self.path or ""):
            raise ValueError(f"path of an endpoint begins with http:// or https:// (found {self.path!r})")
        return self


class Rollout(Section):
    """Who draws the policy's answers in PPO, GRPO, RLOO and RAFT; the others learn from data."""

    engine: Literal["own", "vllm"] = Field("own", description="vllm: a server that gets the LoRA before each batch")
    url: str | None = Field(None, description="vllm: of `vllm serve BASE --enable-lora`, on this machine")

    @model_validator(mode="after")
    def url_for_vllm(self) -> Self:
        if (self.engine == "own") != (self.url is None):
            what = "needs a url" if self.url is None else f"has no url: leave {self.url!r} out"
            raise ValueError(f"engine {self.engine} {what}")
        if self.url is not None and not re.match(r"https?://.", self.url):
            raise ValueError(f"url begins with http:// or https:// (found {self.url!r})")
        return self
