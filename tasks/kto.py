"""KTO from models/sft on the labelled answers of prepared/rows/kto; writes models/kto.

Where data.kto is empty, the best answers of prepared/rows/reward count as good and the others as bad.
"""

from typing import TYPE_CHECKING, Any

from tasks import policy
from tasks.stage import Stage, main
from tasks.tokenized import tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(stage: Stage) -> dict[str, float]:
    from glm.training import kto

    return policy.improve(stage, kto.train, stage.params.kto, labelled)


def labelled(stage: Stage, tokenizer: "PreTrainedTokenizerBase", split: str) -> list[dict[str, Any]]:
    """Prompt and answer as token ids, with a label."""
    from glm.training.kto import labelled_answer, labelled_ranking

    if stage.params.data.kto:
        return [labelled_answer(example) for example in tokenized(stage, tokenizer, "kto", split)]
    return [row for ranking in tokenized(stage, tokenizer, "reward", split) for row in labelled_ranking(ranking)]


if __name__ == "__main__":
    main("kto", run, shared=True)
