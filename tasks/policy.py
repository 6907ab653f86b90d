"""What the steps that improve the policy have in common: tasks/ppo.py and its rivals.

Each trains the adapter of models/sft against, or watched by, what `reward_model` names, writes models/<algorithm>, and
goes on from its last checkpoint when it was killed and the same command is given again on the same inputs.
"""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import ONLINE, Method, Params, Ppo, Rival
from glm.errors import InputError
from tasks.base_model import load_base_tokenizer, load_shared
from tasks.rewards import load_scorer
from tasks.stage import Stage
from tasks.tokenized import tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from glm.generation.remote_rollout import RemoteRollout
    from glm.training.policy_eval import Judged

SFT = Path("models/sft")
REWARD = Path("models/reward")
SAMPLES = 8  # dev prompts whose answers are kept with the run, at every look

Rows = Callable[[Stage, "PreTrainedTokenizerBase", str], Any]  # what an algorithm trains on, by split
Train = Callable[..., dict[str, float]]  # such as glm.training.dpo.train


def improve(
    stage: Stage, train: Train, section: Ppo | Rival, rows: Rows, *, method: Method = "lora", resume: bool = True
) -> dict[str, float]:
    """Train the policy by one algorithm on `rows`, with its `section` of params.yaml, and write it.

    `method` is what is trained of it: with `resume` a copy of what SFT trained, if that is of this method, else
    something fresh on top.

    Raises:
        InputError: fewer rows than one batch, no dev prompts, or something else that `train` refuses.
    """
    from glm.models.lineage import above, chain
    from glm.models.saving import save_trained
    from glm.training.actors import Actors, NewPolicy
    from glm.training.checkpoint import Checkpoints

    params = stage.params
    tokenizer = load_base_tokenizer()
    train_set, dev_prompts = rows(stage, tokenizer, "train"), prompts(stage, tokenizer, "dev")
    if len(train_set) < section.batch_size:
        raise InputError(
            f"{params.algorithm}.batch_size {section.batch_size} is more than the {len(train_set)} training rows"
        )
    scorer = load_scorer(params, tokenizer)
    below, start = above(SFT).starting(method, resume=resume)
    below.check(method)
    model, beneath = load_shared(params, below.parts, chain(SFT), chain(REWARD))
    checkpoints = Checkpoints(stage.checkpoint_folder)
    with open_rollout(stage) as rollout:
        actors = Actors(
            model,
            policy=NewPolicy(method, params.sft, below.parts, start),
            reference=SFT,
            reward=REWARD,
            beneath=beneath,
            scorer=scorer,
            rollout=rollout,
        )
        numbers = train(
            actors,
            tokenizer,
            train_set,
            dev_prompts,
            section,
            seed=params.seed,
            log=stage.log,
            progress=stage.progress,
            log_speed=stage.log_speed,
            show=lambda step, judged: show(stage, tokenizer, dev_prompts, step, judged),
            checkpoints=checkpoints,
        )
    if stage.follows:
        return numbers
    actors.finish()
    folder = f"models/{params.algorithm}"
    save_trained(actors.model, method, folder, below, name="policy", weights=actors.policy, tokenizer=tokenizer)
    stage.log_adapter(folder)
    checkpoints.clear()
    return numbers


def open_rollout(stage: Stage) -> "AbstractContextManager[RemoteRollout | None]":
    """The server that draws the policy's answers, where one is named and the algorithm learns from its own answers.

    Raises:
        InputError: it cannot be reached.
    """
    from glm.generation.remote_rollout import RemoteRollout

    options = stage.params.rollout
    if options.url is None or stage.params.algorithm not in ONLINE:
        return nullcontext()
    return RemoteRollout(options.url, stage.checkpoint_folder / "rollout", os.environ.get("GLMFLOW_ROLLOUT_API_KEY"))


def prompts(stage: Stage, tokenizer: "PreTrainedTokenizerBase", split: str) -> list[list[int]]:
    """Token ids of the prompts of data.ppo."""
    return [example["input_ids"] for example in tokenized(stage, tokenizer, "ppo", split)]


def rankings(stage: Stage, tokenizer: "PreTrainedTokenizerBase", split: str) -> Any:
    """The ranked answers of data.reward, with `sequences` and `starts`."""
    return tokenized(stage, tokenizer, "reward", split)


def show(
    stage: Stage, tokenizer: "PreTrainedTokenizerBase", asked: list[list[int]], step: int, judged: "Judged"
) -> None:
    """Keep a look at the dev prompts with the run: the first answers as JSON, all rewards as a histogram."""
    from glm.evaluation.reward_report import draw_rewards
    from glm.generation.decode import decode

    questions = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in asked[:SAMPLES]]
    told = [decode(tokenizer, answer) for answer in judged.answers[:SAMPLES]]
    rows = zip(questions, told, judged.rewards.tolist(), judged.kl.tolist(), strict=False)
    samples = [dict(zip(("prompt", "answer", "reward", "kl"), row, strict=True)) for row in rows]
    stage.log_json(f"samples/step-{step:05}.json", samples)
    stage.log_figure(f"rewards/step-{step:05}.png", draw_rewards(judged.rewards.tolist(), f"step {step}"))


def check_reward_model(params: Params, minimum_accuracy: float) -> None:
    """Refuse a reward model that orders held-out answers little better than chance: a policy would chase noise.

    One from outside is its owner's affair.

    Raises:
        InputError: its accuracy on the test pairs is below `minimum_accuracy`.
    """
    if params.reward_model.source != "own":
        return
    accuracy = json.loads(Path("metrics/reward.json").read_text(encoding="utf-8"))["test_accuracy"]
    if accuracy < minimum_accuracy:
        raise InputError(
            f"the reward model orders {accuracy:.3f} of the held-out pairs rightly, "
            f"{params.algorithm}.minimum_reward_accuracy is {minimum_accuracy}: train it longer or on more pairs, or "
            "lower the bound"
        )
