"""What a policy's sampled answers to held-out prompts are like: reward, KL, length, repetition."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glm.data.encode import end_id
from glm.errors import InputError
from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.sampling import Sampling
from glm.training.trainer import Log


@dataclass
class Judged:
    """Answers to n prompts with the reward model's score and the KL estimate (k1, nats) of each."""

    answers: list[list[int]]
    rewards: Tensor  # [n]
    kl: Tensor  # [n]


Show = Callable[[int, Judged], None]  # (step, answers to the dev prompts)


class Watch:
    """The looks at the dev prompts during a training, and the points of its curves; both outlive a break.

    `before` and `after` are the numbers of the first and the last look.
    """

    def __init__(
        self,
        actors: Actors,
        tokenizer: PreTrainedTokenizerBase,
        dev_prompts: list[list[int]],
        params: Sampling,
        *,
        seed: int,
        log: Log,
        show: Show | None = None,
    ) -> None:
        """Raises InputError if there are no dev prompts."""
        if not dev_prompts:
            raise InputError("a policy's progress is measured on dev prompts, and there are none: raise data.dev_ratio")
        self.actors, self.tokenizer, self.dev_prompts, self.params = actors, tokenizer, dev_prompts, params
        self.seed, self.log, self.show = seed, log, show
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.curves: list[tuple[int, dict[str, float]]] = []

    def start(self) -> None:
        """The look before the first step."""
        values = self.look(0)
        self.before = self.after
        self.record(0, values)

    def look(self, step: int) -> dict[str, float]:
        """Have the policy answer the dev prompts; the numbers as `eval_<name>`. The policy is in place afterwards."""
        judged = judge(self.actors, self.tokenizer, self.dev_prompts, self.params, seed=self.seed)
        self.actors.use("policy")
        if self.show:
            self.show(step, judged)
        self.after = summary(judged, end_id(self.tokenizer))
        return {f"eval_{name}": value for name, value in self.after.items()}

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log a point of the curves."""
        self.curves.append((step, values))
        self.log(step, values)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"before": self.before, "after": self.after, "curves": self.curves}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; its points are logged again."""
        self.before, self.after = state["before"], state["after"]
        for step, values in state["curves"]:
            self.record(step, values)

    def result(self) -> dict[str, float]:
        """The numbers after the training, and those before it as `<name>_before`."""
        return {f"{name}_before": value for name, value in self.before.items()} | self.after


@torch.no_grad()
def judge(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: Sampling,
    *,
    seed: int,
    adapter: str = "policy",
) -> Judged:
    """Answer the prompts under `adapter`, always with the same random numbers, and score the answers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        samples = actors.sample(prompts, tokenizer, params, adapter)
    batch = batch_of(prompts, samples.answers, actors.model.device)
    reference = actors.logprobs("reference", batch, params.temperature)
    return Judged(samples.answers, actors.score(batch), (samples.logprobs - reference).sum(-1))


def evaluate(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: Sampling,
    *,
    seed: int,
    adapter: str = "policy",
) -> dict[str, float]:
    """`summary` of `judge`."""
    return summary(judge(actors, tokenizer, prompts, params, seed=seed, adapter=adapter), end_id(tokenizer))


def summary(judged: Judged, end: int) -> dict[str, float]:
    """What the answers are like, in the same words for all algorithms.

    `reward` (mean) and its standard deviation `reward_std`, `kl` (mean, nats an answer from the adapter "reference"),
    `response_length` in tokens, `truncated` (share that did not end within max_new_tokens), `repetition`.
    """
    answers, rewards = judged.answers, judged.rewards.float()
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "kl": judged.kl.mean().item(),
        "response_length": sum(map(len, answers)) / len(answers),
        "truncated": sum(answer[-1] != end for answer in answers) / len(answers),
        "repetition": repetition(answers),
    }


def with_distribution(judged: Judged, end: int) -> dict[str, float]:
    """`summary`, and how the rewards are spread: `reward_p10` …: a tenth of the answers is below. For every step."""
    rewards = judged.rewards.float()
    tenth, median, last_tenth = rewards.quantile(rewards.new_tensor([0.1, 0.5, 0.9])).tolist()
    return summary(judged, end) | {"reward_p10": tenth, "reward_p50": median, "reward_p90": last_tenth}


def repetition(answers: list[list[int]]) -> float:
    """Share of an answer's token pairs that the same answer had before, averaged over answers."""
    shares = []
    for answer in answers:
        bigrams = list(pairwise(answer))
        shares.append(1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0)
    return sum(shares) / len(shares)
