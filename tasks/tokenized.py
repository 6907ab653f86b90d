"""Prepared rows as token ids, through the cache that all checkouts of this repository share."""

from pathlib import Path
from typing import TYPE_CHECKING

from glm.errors import InputError
from tasks.stage import Stage
from tasks.tracking import main_checkout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glm.data.cache import TokenizedRows
    from glm.data.rows import Use

ROWS = "prepared/rows"


def cache_folder() -> Path:
    """Where tokenised sets are kept."""
    return main_checkout() / ".cache" / "tokenized"


def tokenized(stage: Stage, tokenizer: "PreTrainedTokenizerBase", use: "Use", split: str) -> "TokenizedRows":
    """The rows of one split as token ids; recorded as an input of the stage's run.

    Raises:
        InputError: params.yaml names no dataset for this use.
    """
    from glm.data.cache import tokenize

    if not getattr(stage.params.data, use):
        raise InputError(f"data.{use}: empty, but the step {stage.name} needs rows: name a dataset")
    path = Path(ROWS, use, f"{split}.jsonl")
    rows = tokenize(path, tokenizer, stage.params.data, cache_folder(), progress=stage.progress)
    stage.log_dataset(use, path, split=split, rows=len(rows), tokenised=rows.key)
    return rows
