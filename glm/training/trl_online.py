"""What TRL's GRPO and RLOO trainers share here: our rollouts and rewards, and batches that processes share.

An optimizer step has one batch of prompts with their answers. All processes draw, score, shuffle and split the answers
together, and each computes its share of every part: so their number changes nothing but rounding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, pad_across_processes
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from glm.config import Grouped
from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.distributed import joined, own_part, world_size
from glm.training.policy_loop import batch_at
from glm.training.trl_policy import PolicyCheckpoints, run

NAMES = {  # what GRPO's and RLOO's trainers log, and its name in our curves
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "reward": "reward",
    "reward_std": "reward_std",
    "kl": "kl_per_token",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_fraction",
    "completions/mean_length": "response_length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "zero_spread",
}
Make = Callable[..., PolicyCheckpoints]  # see `train`


def train(
    make: Make,
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    dev_prompts: list[list[int]],
    params: Grouped,
    *,
    seed: int,
    **options: Any,
) -> dict[str, float]:
    """Train the policy adapter in place on `prompts`; see `trl_policy.run` for the rest and the options.

    `make(actors, tokenizer, prompts, params, folder, seed)` makes TRL's trainer. Curves: `loss`, `reward` and
    `reward_std` of the answers, `kl_per_token` to the reference, `entropy`, `clip_fraction`, `response_length`,
    `truncated`, and `zero_spread`, the share of prompts whose answers score alike.

    Raises:
        InputError: fewer prompts than one batch.
    """

    def make_trainer(folder: Path) -> PolicyCheckpoints:
        return make(actors, tokenizer, prompts, params, folder, seed)

    return run(make_trainer, actors, tokenizer, dev_prompts, params, NAMES, seed=seed, **options)


def arguments(params: Grouped) -> dict[str, Any]:
    """What GRPO and RLOO have in common: one batch of prompts with their answers is one optimizer step."""
    parts = params.gradient_accumulation_steps
    return {
        "per_device_train_batch_size": params.batch_size * params.num_generations // (parts * world_size()),
        "gradient_accumulation_steps": parts,
        "steps_per_generation": parts,
        "num_generations": params.num_generations,
        "num_iterations": params.num_iterations,
        "beta": params.beta,
        "epsilon": params.epsilon,
        "max_completion_length": params.max_new_tokens,
        "temperature": params.temperature,
        "shuffle_dataset": False,  # see inputs
    }


def inputs(
    actors: Actors, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], params: Grouped, seed: int
) -> dict[str, Any]:
    """Model, rewards and data of GRPO's and RLOO's trainers.

    The prompts of all steps come one after the other: TRL's own order is not found again after a break.
    """
    from datasets import Dataset

    batches = range(1, -(-params.max_steps // params.num_iterations) + 1)
    order = [index for batch in batches for index in batch_at(batch, len(prompts), params.batch_size, seed)]
    return {
        "model": actors.model,
        "reward_funcs": reward_function(actors),
        "train_dataset": Dataset.from_dict({"prompt": [prompts[index] for index in order]}),
        "processing_class": tokenizer,
    }


class OnTokens(PolicyCheckpoints):
    """What GRPO's and RLOO's trainers do in our way: prompts are token ids, and processes share whole batches."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """They are tokens; TRL would apply the chat template and encode."""
        return prompts, None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The answers of all processes: TRL, which shuffles and splits them, does so as in one process."""
        own = super()._generate_and_score_completions(inputs)
        return {name: rows_of_all(name, value) for name, value in own.items()}

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, on rows that are padded as far as those of all processes: as the loss will be computed.

        A token's place in its row shows in the last digits of its log-probability, and where old and new ones are of
        the same weights, nothing may differ.
        """
        width = input_ids.shape[1] - logits_to_keep
        (prompts, answers), masks = (
            [as_wide_as_all(rows[:, :width], left=True), as_wide_as_all(rows[:, width:])]
            for rows in (input_ids, attention_mask)
        )
        ids, mask = torch.cat([prompts, answers], dim=1), torch.cat(masks, dim=1)
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            model, ids, mask, answers.shape[1], *args, **kwargs
        )
        return logps[:, :logits_to_keep], None if entropies is None else entropies[:, :logits_to_keep], aux_loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """This process's share of the part that is next."""
        part = super()._prepare_inputs(generation_batch)
        return {name: own_part(value) if value.ndim else value for name, value in part.items()}


def as_wide_as_all(rows: Tensor, *, left: bool = False) -> Tensor:
    """Rows [m, length] padded by zeros to the longest of all processes."""
    return pad_across_processes(rows, dim=1, pad_first=left) if world_size() > 1 else rows


def rows_of_all(name: str, value: Tensor) -> Tensor:
    """A field of TRL's batches, [m] or [m, length], with the rows of all processes; what has no rows is left alone.

    Prompts are padded on the left, answers on the right.
    """
    if value.ndim == 0:
        return value
    return gather(as_wide_as_all(value, left=name.startswith("prompt_")) if value.ndim == 2 else value)


def sampled(
    actors: Actors, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], params: Grouped
) -> list[list[int]]:
    """The policy's answers to this process's prompts, drawn together with those of the others."""
    return own_part(actors.sample(joined(prompts), tokenizer, params).answers)


def reward_function(actors: Actors) -> Callable[..., list[float]]:
    """The actors' reward of token-id prompts and answers, as TRL's trainers ask for it; the policy stays active."""

    def reward(prompts: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = actors.score(batch_of(joined(prompts), joined(completion_ids), actors.model.device))
        actors.use("policy")
        return own_part(scores).tolist()

    return reward
