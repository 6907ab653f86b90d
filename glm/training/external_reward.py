"""Rewards from outside: a Python function, a sequence classifier of any family, or an HTTP endpoint.

    score = load(params.reward_model)            # (prompts, answers) as text → a number each
    scorer = Scorer(score, tokenizer, texts)     # the same for token ids: what Actors take

Endpoint: POST {"prompts": [text, …], "answers": [text, …]} as JSON, answered by {"rewards": [number, …]} in the same
order, status 200. A request that fails in transport, takes longer than `timeout` seconds, or is answered by 429 or 5xx
is sent again after 1, 2, 4, … seconds, `max_retries` times; so an endpoint must not mind being asked twice.
"""

import importlib
import importlib.util
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glm.config import RewardModel
from glm.errors import InputError
from glm.generation.decode import decode
from glm.models.checkpoint import local_folder
from glm.training.batch import Batch

Score = Callable[[list[str], list[str]], list[float]]  # prompts and answers → rewards


class Scorer:
    """Rewards [n] of token-id prompts and answers by a `score` of their texts.

    `texts` gives a prompt's text by its ids; one that is not there is decoded, its chat template included.
    """

    def __init__(
        self, score: Score, tokenizer: PreTrainedTokenizerBase, texts: dict[tuple[int, ...], str] | None = None
    ) -> None:
        self.score = score
        self.tokenizer = tokenizer
        self.texts = texts or {}

    def __call__(self, batch: Batch) -> Tensor:
        asked = [
            self.texts.get(tuple(prompt)) or self.tokenizer.decode(prompt, skip_special_tokens=True)
            for prompt in batch.prompts
        ]
        return torch.tensor(self.score(asked, [decode(self.tokenizer, answer) for answer in batch.answers]))


def load(params: RewardModel) -> Score:
    """The source that `params` names, asked for `batch_size` answers at a time, its rewards checked.

    Raises:
        InputError: now, if there is no such function or model; later, if a reward is missing or no finite number, or
            the endpoint does not answer. What a function itself raises goes through, with a note of where it came from.
    """
    path = params.path or ""
    if params.source == "function":
        score = load_function(path)
    elif params.source == "classifier":
        score = load_classifier(path, params.revision)
    else:
        score = endpoint(path, params.timeout, params.max_retries)

    def checked(prompts: list[str], answers: list[str]) -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(prompts), params.batch_size):
            part = slice(start, start + params.batch_size)
            rewards += check_rewards(score(prompts[part], answers[part]), len(prompts[part]), path)
        return rewards

    return checked


def check_rewards(rewards: Any, count: int, where: str) -> list[float]:
    """The rewards as floats.

    Raises:
        InputError: they are not `count` finite numbers.
    """
    try:
        if isinstance(rewards, str | dict):
            raise TypeError
        values = [float(reward) for reward in rewards]
    except (TypeError, ValueError):
        raise InputError(f"reward_model {where}: expected {count} numbers, found {rewards!r:.200}") from None
    if len(values) != count:
        raise InputError(f"reward_model {where}: {len(values)} rewards for {count} answers")
    for place, value in enumerate(values):
        if not math.isfinite(value):
            raise InputError(f"reward_model {where}: reward {place} of {count} is {value}")
    return values


def load_function(path: str) -> Score:
    """The function `module:name` or `file.py:name`: called as name(prompts, answers) with lists of texts.

    Raises:
        InputError: there is no such module, file or function, or running the file fails.
    """
    source, _, name = path.rpartition(":")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"reward_model.path {path}: {source} has no function {name!r}; it has {', '.join(names)}")

    def score(prompts: list[str], answers: list[str]) -> list[float]:
        try:
            return function(prompts, answers)
        except Exception as error:
            error.add_note(f"reward_model.path {path} raised this, asked for {len(answers)} rewards")
            raise

    return score


def load_classifier(path: str, revision: str | None = None) -> Score:
    """A sequence classifier with one output, or the second of two less the first.

    It has its own tokenizer, reads prompt and answer by its chat template, or as a pair of texts where it has none, and
    runs on the GPU where there is one.

    Raises:
        InputError: there is no such model, it has other labels, or it was never trained to classify.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        folder = local_folder(path, revision)
    except InputError as error:
        raise InputError(f"reward_model.path: {error}") from None
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"reward_model.path: {path}: no sequence classifier: {str(error).splitlines()[0]}") from None
    if model.config.num_labels > 2:
        raise InputError(f"reward_model.path {path}: {model.config.num_labels} labels, not one, or bad and good")
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"reward_model.path {path}: no trained classifier: its files have no {', '.join(missing)}, so that rewards "
            "would be random"
        )
    if tokenizer.pad_token is None:  # of those that were causal LMs; what is padded is read at its last other token
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.chat_template:
        tokenizer.truncation_side = "left"  # the answer is at the end
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 4096)

    @torch.no_grad()
    def score(prompts: list[str], answers: list[str]) -> list[float]:
        texts: tuple[list[str], ...] = (prompts, answers)
        if tokenizer.chat_template:
            texts = ([_chat(tokenizer, *each) for each in zip(prompts, answers, strict=True)],)
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        inputs = tokenizer(*texts, **options, add_special_tokens=not tokenizer.chat_template)
        logits = model(**inputs.to(model.device)).logits.float()
        # of two labels, how much more likely "good" is than "bad"
        return (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()

    return score


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(said, tokenize=False)


def endpoint(url: str, timeout: float, max_retries: int) -> Score:
    """An HTTP endpoint; the format is described above."""

    def score(prompts: list[str], answers: list[str]) -> list[float]:
        body = json.dumps({"prompts": prompts, "answers": answers}, ensure_ascii=False).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        for attempt in range(max_retries + 1):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    return _read_answer(response.read(), url)
            except urllib.error.HTTPError as error:
                wrong = f"status {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    break
            except OSError as error:  # refused, reset, timed out
                wrong = str(error) or type(error).__name__
        raise InputError(f"reward_model.path {url}: no rewards after {attempt + 1} requests: {wrong}")

    return score


def _read_answer(body: bytes, url: str) -> list[float]:
    try:
        return json.loads(body)["rewards"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f'reward_model.path {url}: expected {{"rewards": [...]}}, found {body[:200]!r}') from None


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"reward_model.path: module {name!r} cannot be imported: {error}") from None


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"reward_model.path: no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"reward_model.path: {path} cannot be run: {type(error).__name__}: {error}") from error
    return module
