"""Group relative policy optimisation (Shao et al. 2024, eq. 3 and 4), by TRL's GRPOTrainer.

Advantages are an answer's reward less the mean of those to the same prompt, divided by their spread; there is no value
head.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from glm.config import Grpo
from glm.training import trl_online, trl_policy
from glm.training.actors import Actors


def make(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: Grpo,
    folder: Path,
    seed: int,
) -> trl_policy.PolicyCheckpoints:
    """TRL's trainer with our rollouts and rewards; its prompts are token ids."""
    from trl import GRPOConfig, GRPOTrainer

    class TokenGRPOTrainer(trl_online.OnTokens, GRPOTrainer):
        """Answers by our decoder; TRL would call `generate`."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
            return trl_online.sampled(actors, tokenizer, prompt_ids, params), None

        def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            loss = super()._compute_loss(model, inputs)
            if params.loss_type != "bnpo":
                return loss
            tokens = inputs["completion_mask"].sum().float()  # TRL divides by this process's, not by those of all
            return loss * (tokens / self.accelerator.reduce(tokens, "mean"))

    args = GRPOConfig(
        **trl_policy.arguments(params, folder, seed),
        **trl_online.arguments(params),
        loss_type=params.loss_type,
        scale_rewards=params.scale_rewards,
    )
    return TokenGRPOTrainer(args=args, **trl_online.inputs(actors, tokenizer, prompts, params, seed))


train = partial(trl_online.train, make)
