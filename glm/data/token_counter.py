"""How long rows are in tokens: by a rule of thumb before there is a tokenizer, by the tokenizer itself afterwards."""

from typing import TYPE_CHECKING

from glm.config import Data
from glm.data.rows import Row
from glm.data.text import estimate_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_TOKENS = 32  # more than any template puts around a message


class TokenEstimate:
    """Counts by `estimate_tokens`: the embedded tokenizer does not exist until the rows do."""

    name = "estimate"

    def __init__(self, params: Data) -> None:
        self.params = params

    def count(self, text: str) -> int:
        """Tokens of a text on its own, without a template's."""
        return estimate_tokens(text)

    def truncated(self, row: Row, lengths: list[int]) -> bool:
        """Whether encoding the row, whose texts have these lengths, will cut it."""
        return self._over(row, lengths, margin=0)

    def _over(self, row: Row, lengths: list[int], margin: int) -> bool:
        if "text" in row:
            return False
        answers = len(row.get("answers", [0])) if row.get("answer", "") is not None else 0
        prompt, given = lengths[: len(lengths) - answers], lengths[len(lengths) - answers :]
        too_long = sum(prompt) + margin * (len(prompt) + 1) > self.params.max_source_length
        return too_long or any(length + margin > self.params.max_target_length for length in given)


class TokenizerCounter(TokenEstimate):
    """Counts by the model's tokenizer; rows near the limits are encoded to see whether they are cut."""

    def __init__(self, params: Data, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
        super().__init__(params)
        self.tokenizer = tokenizer
        self.name = name

    def count(self, text: str) -> int:
        """Tokens of a text on its own, without a template's."""
        return len(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def truncated(self, row: Row, lengths: list[int]) -> bool:
        """Whether encoding the row cuts it."""
        if not self._over(row, lengths, margin=TEMPLATE_TOKENS):
            return False
        from glm.data.encode import is_truncated

        return is_truncated(self.tokenizer, row, self.params)
