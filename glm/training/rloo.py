"""REINFORCE leave-one-out (Ahmadian et al. 2024, eq. 7), by TRL's RLOOTrainer.

An answer's advantage is its reward, less β KL, less the mean of the other answers' to the same prompt.
"""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm.config import Rloo
from glm.training import trl_online, trl_policy
from glm.training.actors import Actors


def make(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: Rloo,
    folder: Path,
    seed: int,
) -> trl_policy.PolicyCheckpoints:
    """TRL's trainer with our rollouts and rewards; its prompts are token ids."""
    from trl import RLOOConfig, RLOOTrainer

    class TokenRLOOTrainer(trl_online.OnTokens, RLOOTrainer):
        """Answers by our decoder; TRL would call `generate`."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
            return trl_online.sampled(actors, tokenizer, prompt_ids, params)

    args = RLOOConfig(
        **trl_policy.arguments(params, folder, seed),
        **trl_online.arguments(params),
        normalize_advantages=params.normalize_advantages,
    )
    return TokenRLOOTrainer(args=args, **trl_online.inputs(actors, tokenizer, prompts, params, seed))


train = partial(trl_online.train, make)
