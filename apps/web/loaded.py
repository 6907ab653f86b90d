"""The models that the page answers with: loaded when first asked for, the least used one given up for another."""

import gc
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from apps.chat import Chat
from apps.models import KINDS, Resolved, resolve
from apps.serve.feedback import FeedbackStore
from apps.web.paths import check_path
from flows import ROOT
from glm.config import Data
from glm.errors import InputError

if TYPE_CHECKING:
    from glm.serving.engine import Engine

MOST = 2  # models in memory
FEEDBACK = ROOT / "data" / "feedback"


@dataclass
class Loaded:
    """A model that answers, and what is said of its answers."""

    resolved: Resolved
    engine: "Engine"
    store: FeedbackStore
    closing: ExitStack

    @property
    def version(self) -> str:
        return self.resolved.version or self.resolved.name

    def chat(self, system: str, max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> Chat:
        """A dialogue with it.

        Raises:
            InputError: `max_new_tokens` leaves no room for a question.
        """
        longest = self.engine.max_length - max_new_tokens
        if longest < 16:
            raise InputError(
                f"max_new_tokens: {max_new_tokens} leaves no room for a question in {self.engine.max_length}"
            )
        data = Data(max_source_length=longest, source_prefix=self.resolved.data.source_prefix)
        chat = Chat(self.engine, data, max_new_tokens, temperature, top_p, seed)
        if system:
            chat.messages.append({"role": "system", "content": system})
        return chat


class Models:
    """Models by the names that people give; shared by all who look at the page."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()

    def get(self, field: str, name: str) -> Loaded:
        """The model of this name. `field` is what it is called in an error.

        Raises:
            InputError: there is no such model, or the name leads out of the project.
        """
        name = check_path(field, name)
        if not name:
            raise InputError(f"{field}: empty; expected {KINDS}")
        with self._lock:  # one load at a time
            resolved = resolve(name)
            key = "\n".join([resolved.base, resolved.version, *resolved.adapters])
            if key not in self._loaded:
                while len(self._loaded) >= MOST:
                    self._unload()
                self._loaded[key] = load(resolved)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def close(self) -> None:
        """Give up all of them."""
        with self._lock:
            while self._loaded:
                self._unload()

    def _unload(self) -> None:
        import torch

        _, oldest = self._loaded.popitem(last=False)
        oldest.closing.close()
        del oldest
        gc.collect()
        torch.cuda.empty_cache()


def load(resolved: Resolved) -> Loaded:
    """Load a model and start its engine."""
    from glm.serving.engine import Engine  # torch takes seconds

    model, tokenizer = resolved.load()
    stack = ExitStack()
    engine = stack.enter_context(Engine(model, tokenizer, max_batch=8))
    return Loaded(resolved, engine, FeedbackStore(FEEDBACK, resolved.version or resolved.name), stack)
