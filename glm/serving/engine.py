"""The generation engine: one thread that answers many requests together.

    with Engine(model, tokenizer) as engine:
        request = Request(prompt_ids, SamplingParams(max_new_tokens=64), AnswerReader(tokenizer), deliver=print)
        engine.submit(request)

Glm models that `decode_step` knows get `Slots`: a request joins at the next token and leaves with its last one. All
others (ChatGLM-6B, prefixes, quantised weights, other families) are answered in batches by transformers' `generate`:
who comes later waits until the batch has ended. A request's answer is the same either way: its tokens depend on its own
logits, parameters and seed. (A row's logits may differ in their last bits with the size of the batch, as matrix
products do.)
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from glm.data.collate import pad_ids
from glm.errors import InputError
from glm.generation import decode_step
from glm.serving.loras import Loras
from glm.serving.request import DEFAULT_LENGTH, QueueFullError, Request, RequestQueue, end_ids
from glm.serving.sampling import choose
from glm.serving.slots import Slots

log = logging.getLogger(__name__)


class Engine(RequestQueue):
    """Answers requests with one model.

    Args:
        max_batch: requests answered at once.
        max_length: tokens of prompt and answer together; None: 2048, or what the model was made for if that is less.
        max_waiting: requests that may wait for a place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 32,
        max_length: int | None = None,
        max_waiting: int = 256,
    ) -> None:
        longest = getattr(model.config, "max_position_embeddings", DEFAULT_LENGTH)  # not every family has a bound
        max_length = min(longest, DEFAULT_LENGTH) if max_length is None else max_length
        if max_length > longest:
            raise InputError(f"max_length: {max_length} tokens, but the model was made for {longest}")
        super().__init__(
            tokenizer,
            ends=end_ids(model.generation_config, tokenizer),
            vocab_size=model.config.vocab_size,
            max_batch=max_batch,
            max_length=max_length,
            max_waiting=max_waiting,
        )
        self.model = model
        self.slots = Slots(model, rows=max_batch, columns=max_length) if decode_step.supports(model) else None
        self.how = "in slots" if self.slots else "batch by batch"
        self.loras = Loras(model)
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def __enter__(self) -> Self:
        if self.slots:
            self.slots.warm_up()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def load_lora(self, name: str, folder: Path) -> None:
        """Take up a LoRA between two tokens; requests name it by `lora`. Raises InputError as `Loras.load`."""
        self._between_tokens(lambda: self.loras.load(name, folder))

    def lora_names(self) -> list[str]:
        """The LoRAs that requests may name."""
        return list(self.loras.folders)

    def unload_lora(self, name: str) -> None:
        """Forget a LoRA. Raises InputError if there is no such one, or requests want it."""

        def unload() -> None:
            if name not in self.loras.folders:
                raise InputError(f"lora_name: the adapter {name!a} cannot be found")
            if any(request.lora == name for request in [*self.running, *self.waiting]):
                raise InputError(f"lora_name: requests are answered with the adapter {name!a}")
            if name == self.loras.active:
                self._use_lora("")
            self.loras.unload(name)

        self._between_tokens(unload)

    def _between_tokens(self, job: Callable[[], None]) -> None:
        """Have the engine's thread do something, and wait for it."""
        done: Future[None] = Future()
        with self._wake:
            if self._stopping:
                raise QueueFullError("the engine is shutting down")
            self._jobs.append((job, done))
            self._wake.notify()
        done.result()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self.waiting or self.running or self._jobs or self._stopping)
                if self._stopping:
                    break
            while self._jobs:
                job, done = self._jobs.popleft()
                try:
                    done.set_result(job())
                except Exception as error:
                    done.set_exception(error)
            try:
                if self.slots:
                    self._turn(self.slots)
                else:
                    self._batch()
            except Exception as error:  # out of memory, say: those requests fail, the engine goes on
                log.exception("a batch failed")
                self._fail(str(error).splitlines()[0] if str(error) else type(error).__name__)
        self._fail("the server is shutting down")
        for _, done in self._jobs:
            done.set_exception(QueueFullError("the engine is shutting down"))

    @torch.no_grad()
    def _turn(self, slots: Slots) -> None:
        """One more token for everyone, and the first one for those who come in."""
        if self.running:
            logits = slots.step([request.last_token for request in self.running])
            self._advance(self.running, logits)
            slots.drop(self._leave())
        if arrived := self._admitted():
            self.running += arrived
            self._use_lora(arrived[0].lora)
            self._advance(arrived, slots.admit([request.prompt for request in arrived]))
            slots.drop(self._leave())

    @torch.no_grad()
    def _batch(self) -> None:
        """Answer those who wait, as many as there is room for, to the last one's end."""
        self.running = self._admitted()
        if not self.running:
            return
        self._use_lora(self.running[0].lora)
        batch = pad_ids([request.prompt for request in self.running], self.tokenizer.pad_token_id, "left")
        hooks = _Hooks(self, list(self.running))
        self.model.generate(
            **{name: value.to(self.model.device) for name, value in batch.items()},
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(self._room(request) for request in self.running),
            eos_token_id=None,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([hooks]),
            stopping_criteria=StoppingCriteriaList([_Ended(hooks.requests)]),
        )
        self._leave()

    def _admitted(self) -> list[Request]:
        """Take from the queue, in its order, those for whom there is a place; a batch has one LoRA."""
        arrived: list[Request] = []
        with self._wake:
            while self.waiting and len(self.running) + len(arrived) < self.max_batch:
                beside = [*self.running, *arrived]
                if beside and beside[0].lora != self.waiting[0].lora:
                    break
                request = self.waiting.popleft()
                if request.cancelled:
                    self._end(request, "cancelled")
                else:
                    arrived.append(request)
        return arrived

    @torch.no_grad()
    def _use_lora(self, name: str) -> None:
        """Compute with this LoRA; where it is another one than before, no other request is under way."""
        if name != self.loras.active:
            self.loras.use(name)
            if self.slots:
                self.slots.follow_adapter()

    def _advance(self, requests: list[Request], logits: Tensor) -> None:
        """Choose each request's next token and hand out what it adds."""
        draws = [request.random.random() for request in requests]
        for request, chosen in zip(requests, choose(logits, [r.params for r in requests], draws), strict=True):
            if request.finished is None:
                self._take(request, chosen)

    def _leave(self) -> list[int]:
        """Let those go who have ended; returns their places."""
        places = [place for place, request in enumerate(self.running) if request.finished is not None]
        for place in reversed(places):  # as Slots.drop does it
            self.running[place] = self.running[-1]
            self.running.pop()
        return places

    def _fail(self, reason: str) -> None:
        with self._wake:
            failed = self.running + (list(self.waiting) if self._stopping else [])
            self.running = []
            if self._stopping:
                self.waiting.clear()
        if self.slots:
            self.slots.clear()
        for request in failed:
            if request.finished is None:
                self._end(request, "error", reason)


class _Hooks(LogitsProcessor):
    """Lets the engine choose `generate`'s tokens."""

    def __init__(self, engine: Engine, requests: list[Request]) -> None:
        self.engine, self.requests = engine, requests

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.engine._advance(self.requests, scores)
        tokens = torch.tensor([request.last_token for request in self.requests], device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Tells `generate` whose answers have ended."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([request.finished is not None for request in self.requests], device=input_ids.device)
