"""Who draws a variant's answers: the fused decoder where it takes the model, a server that is given the policy's LoRA,
or transformers' generate for all else.
"""

import logging
from typing import Any, Protocol

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from glm.errors import InputError
from glm.generation import decode_step
from glm.generation.decode import generate
from glm.generation.remote_rollout import RemoteRollout
from glm.generation.rollout import Decoder, Samples
from glm.generation.shared_rollout import SharedDecoder
from glm.models.adapters import causal_lm
from glm.models.variants import Variants
from glm.training.distributed import from_first, world_size

POLICY = "policy"

logger = logging.getLogger(__name__)


class Sampling(Protocol):
    """The parameters by which answers are drawn: a section of params.yaml."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def temperature(self) -> float: ...


class Sampler:
    """Draws answers from the whole distribution of the variant that is in use, in torch's global random numbers."""

    def __init__(self, variants: Variants, rollout: RemoteRollout | None = None) -> None:
        """With the variant "policy" in place. With a `rollout` that server draws the policy's answers.

        Raises:
            InputError: a `rollout`, and a policy that is more than one LoRA on the weights of a model.
        """
        self.variants, self.rollout = variants, rollout
        policy = variants.variants[POLICY]
        if rollout is not None and (len(policy.loras) != 1 or policy.prefix is not None or policy.weights):
            raise InputError("rollout.engine vllm: takes a policy that is one LoRA on a model's own weights")
        self.knows_policy = len(policy.loras) < 2 and decode_step.supports(causal_lm(variants.model))
        self.decoder: Decoder | None = None
        if self.knows_policy and rollout is None:
            self.decoder = (Decoder if world_size() == 1 else SharedDecoder)(variants.model)
        elif rollout is None:
            logger.info("the policy's answers come from transformers' generate: the fused decoder does not take it")

    def decode(
        self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, params: Sampling, value_head: nn.Linear
    ) -> Samples | None:
        """One answer to each prompt by the decoder; None if it does not take the variant in use."""
        if self.decoder is None or not self._decodable(self.variants.active):
            return None
        return self.decoder.sample(
            prompts,
            tokenizer,
            max_new_tokens=params.max_new_tokens,
            batch_size=params.batch_size,
            do_sample=True,
            temperature=params.temperature,
            value_head=value_head,
        )

    def generate(
        self, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, params: Sampling
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """One answer to each prompt by the server or by transformers; with the former's own log-probabilities."""
        model = self.variants.model
        limits: dict[str, Any] = {"max_new_tokens": params.max_new_tokens, "temperature": params.temperature}
        if self.rollout is not None and self.variants.active == POLICY:
            assert isinstance(model, PeftModel)
            return self.rollout.sample(model, POLICY, prompts, tokenizer, **limits)
        # by all processes alike: transformers draws for whole batches
        answers = generate(model, tokenizer, prompts, **limits, batch_size=params.batch_size, do_sample=True)
        return from_first(answers), None

    def _decodable(self, name: str) -> bool:
        """Whether the decoder, which was made with the policy in place, is right for this variant too."""
        policy, wanted = self.variants.variants[POLICY], self.variants.variants[name]
        same = wanted.weights.keys() == policy.weights.keys() and all(
            wanted.weights[key] is policy.weights[key] for key in policy.weights
        )
        return same and wanted.prefix is policy.prefix and len(wanted.loras) < 2
