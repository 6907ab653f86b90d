"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 7 and 8) on labelled answers, by TRL's KTOTrainer.

TRL pairs each prompt with the answer of its neighbour in the batch to estimate the KL term, so that rows keep a fixed
order, which is drawn here once.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm.config import Kto
from glm.data.encode import answer_start
from glm.errors import InputError
from glm.training import trl_policy
from glm.training.actors import Actors
from glm.training.distributed import world_size

NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "rewards/margins": "margin",
    "kl": "kl",
}
Row = dict[str, Any]  # `prompt_ids`, `completion_ids`, `label`


def train(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    dev_prompts: list[list[int]],
    params: Kto,
    *,
    seed: int,
    **options: Any,
) -> dict[str, float]:
    """Train the policy adapter in place on labelled `rows`; see `trl_policy.run` for the rest and the options.

    Curves: `loss`, the mean implicit rewards β log π/π_ref of good and bad answers (`chosen`, `rejected`) and their
    difference `margin`, the estimated `kl`.

    Raises:
        InputError: fewer rows than one batch.
    """
    if len(rows) < params.batch_size:
        raise InputError(f"kto.batch_size {params.batch_size} is more than the {len(rows)} labelled answers")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)

    def make_trainer(folder: Path) -> trl_policy.PolicyCheckpoints:
        return make(actors, tokenizer, shuffled, params, folder, seed)

    return trl_policy.run(make_trainer, actors, tokenizer, dev_prompts, params, NAMES, seed=seed, **options)


def make(
    actors: Actors, tokenizer: PreTrainedTokenizerBase, rows: list[Row], params: Kto, folder: Path, seed: int
) -> trl_policy.PolicyCheckpoints:
    """TRL's trainer on rows that are token ids already, in their order."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    class TokenKTOTrainer(trl_policy.PolicyCheckpoints, KTOTrainer):
        """Takes tokenised rows as they are; TRL would apply the chat template and encode."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    size = params.batch_size
    rows = rows[: len(rows) // size * size]  # whole batches: an incomplete one is never trained on
    mismatched = [  # an answer of another prompt of the same batch, as TRL pairs them
        row["completion_ids"]
        for batch in (rows[start : start + size] for start in range(0, len(rows), size))
        for row in [batch[-1], *batch[:-1]]
    ]
    data = Dataset.from_list([{**row, "KL_completion_ids": other} for row, other in zip(rows, mismatched, strict=True)])
    args = KTOConfig(
        **trl_policy.arguments(params, folder, seed),
        per_device_train_batch_size=size // world_size(),
        max_length=None,  # cut already, by data.max_source_length and data.max_target_length
        beta=params.beta,
        desirable_weight=params.desirable_weight,
        undesirable_weight=params.undesirable_weight,
    )
    return TokenKTOTrainer(model=actors.model, args=args, train_dataset=data, processing_class=tokenizer)


def labelled_answer(example: dict[str, Any]) -> Row:
    """A tokenised row of data.kto."""
    start = answer_start(example["labels"])
    ids = example["input_ids"]
    return {"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": bool(example["label"])}


def labelled_ranking(ranking: dict[str, Any]) -> Iterator[Row]:
    """The answers of a ranking: the best is good, the others are bad."""
    for place, (ids, start) in enumerate(zip(ranking["sequences"], ranking["starts"], strict=True)):
        yield {"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": place == 0}
