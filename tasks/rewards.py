"""The scorer of policies' answers that the section `reward_model` of params.yaml names."""

from typing import TYPE_CHECKING

from glm.config import Params
from glm.data.rows import Row, read_split
from tasks.tokenized import ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glm.training.external_reward import Scorer


def load_scorer(params: Params, tokenizer: "PreTrainedTokenizerBase") -> "Scorer | None":
    """What stands in for models/reward; None if that is what scores.

    Raises:
        InputError: it cannot be loaded.
    """
    from glm.data.encode import prompt_ids
    from glm.training.external_reward import Scorer, load

    if params.reward_model.source == "own":
        return None
    rows = [row for split in ("train", "dev", "test") for row in read_split(ROWS, "ppo", split)]
    texts = {tuple(prompt_ids(tokenizer, row["prompt"], params.data)[0]): text_of(row) for row in rows}
    return Scorer(load(params.reward_model), tokenizer, texts)


def text_of(row: Row) -> str:
    """A prompt as text: what was said, a line a turn, without the chat template's words."""
    return "\n".join(message["content"] for message in row["prompt"])
