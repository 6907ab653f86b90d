"""The chat model that MLflow loads from code: `mlflow.pyfunc.load_model(...)` and `mlflow models serve` run this file.

    curl localhost:5000/invocations -H 'Content-Type: application/json' -d \\
        '{"messages": [{"role": "user", "content": "写一条酒店评论，以“房间”开头。"}], "max_new_tokens": 32}'
    [{"role": "assistant", "content": "..."}]
"""

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext


class ChatModel(PythonModel):
    """A causal language model, with or without adapters, that answers lists of chat messages."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model and its tokenizer from the artifacts (see tasks/logged_models.py, which logs them)."""
        import torch

        from glm.config import Data
        from glm.models import load_model, load_tokenizer
        from glm.models.checkpoint import follow_pointer

        base, revision = follow_pointer(context.artifacts["base"])
        self.model = load_model(
            base,
            adapters=[folder for name, folder in sorted(context.artifacts.items()) if name != "base"],
            device="cuda" if torch.cuda.is_available() else "cpu",
            quantization=context.model_config["quantization"],
            double_quantization=context.model_config["double_quantization"],
            revision=revision,
        )
        self.tokenizer = load_tokenizer(base, revision=revision)
        self.generation = context.model_config["generation"]
        self.data = Data(**context.model_config["data"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, str]]:
        """Answer each row's `messages` (roles system, user, assistant; the last one is the user's).

        `params`: max_new_tokens, do_sample, temperature, top_p, and the seed of the sampling.
        """
        import torch

        from glm.data.encode import prompt_ids
        from glm.generation.decode import decode, generate

        options = self.generation | (params or {})
        torch.manual_seed(options.pop("seed"))
        prompts = [prompt_ids(self.tokenizer, list(messages), self.data)[0] for messages in model_input["messages"]]
        answers = generate(self.model, self.tokenizer, prompts, batch_size=8, **options)
        return [{"role": "assistant", "content": decode(self.tokenizer, answer)} for answer in answers]


mlflow.models.set_model(ChatModel())
