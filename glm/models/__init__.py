"""Models and tokenizers: `load_model` and `load_tokenizer` take every layout that this project knows.

Importing this package registers ChatGLM-6B and its authors' quantised format with transformers' Auto classes.
"""

import logging
from typing import TYPE_CHECKING, Any

from glm.models import chatglm1, lineage, quantization  # noqa: F401 (registers with transformers)
from glm.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_model", "load_tokenizer"]

# peft imports bitsandbytes, which warns everyone on a CPU that a faster kernel could be downloaded from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_tokenizer(path_or_hub_id: str, *, revision: str | None = None, **options: Any) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder or hub id; see `glm.models.tokenization.load_tokenizer`.

    Of a folder that a stage has trained it is the tokenizer of the model that this stands on.
    """
    from glm.models import tokenization  # sentencepiece loads only where a tokenizer is wanted

    path_or_hub_id, revision = lineage.base_of(path_or_hub_id, revision)
    return tokenization.load_tokenizer(path_or_hub_id, revision=revision, **options)
