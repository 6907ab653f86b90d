"""The reward model that MLflow loads from code: it scores the last answer of each list of chat messages."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext


class RewardModel(PythonModel):
    """A tuned model with a scalar head; the higher the score, the better the answer."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load base, adapter and head from the artifacts (see tasks/logged_models.py, which logs them)."""
        import torch

        from glm.config import Data
        from glm.models import load_model, load_tokenizer
        from glm.models.checkpoint import follow_pointer
        from glm.training import reward

        base, revision = follow_pointer(context.artifacts["base"])
        adapters = [folder for name, folder in sorted(context.artifacts.items()) if name != "base"]
        model = load_model(
            base,
            adapters=adapters[:-1],
            device="cuda" if torch.cuda.is_available() else "cpu",
            quantization=context.model_config["quantization"],
            double_quantization=context.model_config["double_quantization"],
            revision=revision,
        )
        self.model = reward.load(model, Path(adapters[-1] if adapters else base))
        self.tokenizer = load_tokenizer(base, revision=revision)
        self.data = Data(**context.model_config["data"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[float]:
        """Score each row's `messages`, whose last one is the answer to be judged."""
        from glm.data.encode import dialogue
        from glm.training.reward import scores_of

        rows = [dialogue(self.tokenizer, list(messages), self.data) for messages in model_input["messages"]]
        sequences = [row["input_ids"] for row in rows]
        return scores_of(self.model, sequences, self.tokenizer.pad_token_id, batch_size=8).tolist()


mlflow.models.set_model(RewardModel())
