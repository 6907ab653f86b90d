"""REINFORCE leave-one-out (Ahmadian et al. 2024, eq. 7), by TRL's RLOOTrainer.

An answer's advantage is its reward, less β KL, less the mean of the other answers' to the same prompt.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm.config import Rloo
from glm.training import trl_policy
from glm.training.actors import Actors


def train(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    dev_prompts: list[list[int]],
    params: Rloo,
    *,
    seed: int,
    **options: Any,
) -> dict[str, float]:
    """Train the policy adapter in place on `prompts`; see `trl_policy.run` for the rest and the options.

    Curves: `loss`, `reward` and `reward_std` of the answers, `kl_per_token` to the reference, `entropy`,
    `clip_fraction`, `response_length`, `truncated`, and `zero_spread`, the share of prompts whose answers score alike.

    Raises:
        InputError: fewer prompts than one batch.
    """

    def make_trainer(folder: Path) -> trl_policy.PolicyCheckpoints:
        return make(actors, tokenizer, prompts, params, folder, seed)

    return trl_policy.run(
        make_trainer, actors, tokenizer, dev_prompts, params, trl_policy.ONLINE_NAMES, seed=seed, **options
    )


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

    class TokenRLOOTrainer(trl_policy.OnTokens, RLOOTrainer):
        """Answers by our decoder; TRL would call `generate`."""

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
            return trl_policy.sampled(actors, tokenizer, prompt_ids, params)

    args = RLOOConfig(
        **trl_policy.arguments(params, folder, seed),
        **trl_policy.online_arguments(params),
        normalize_advantages=params.normalize_advantages,
    )
    return TokenRLOOTrainer(args=args, **trl_policy.online_inputs(actors, tokenizer, prompts, params, seed))
