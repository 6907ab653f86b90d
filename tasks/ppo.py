"""PPO by `ppo.method` from models/sft against models/reward on the prompts of prepared/rows/ppo; writes models/ppo.

A run that was killed goes on from its last checkpoint when the same command is given again on the same inputs.
"""

import json
from pathlib import Path

from glm.errors import InputError
from tasks.base_model import load_base_tokenizer, load_shared
from tasks.stage import Stage, main
from tasks.tokenized import tokenized

SFT = Path("models/sft")
REWARD = Path("models/reward")
CHECKPOINTS = Path(".cache/checkpoints/ppo")  # no output of the stage: DVC removes those before it starts one again
SAMPLES = 8  # dev prompts whose answers are kept with the run, at every look


def run(stage: Stage) -> dict[str, float]:
    from glm.generation.decode import decode
    from glm.models.lineage import above, chain
    from glm.models.saving import save_trained
    from glm.training import ppo
    from glm.training.actors import Actors, NewPolicy
    from glm.training.checkpoint import Checkpoints
    from glm.training.policy_eval import Judged

    params = stage.params
    check_reward_model(params.ppo.minimum_reward_accuracy)
    below, start = above(SFT).starting(params.ppo.method, resume=params.ppo.resume_lora_training)
    below.check(params.ppo.method)
    model, beneath = load_shared(params, below.parts, chain(SFT), chain(REWARD))
    tokenizer = load_base_tokenizer()
    prompts = {
        split: [example["input_ids"] for example in tokenized(stage, tokenizer, "ppo", split)]
        for split in ("train", "dev")
    }
    checkpoints = Checkpoints(CHECKPOINTS / stage.fingerprint)

    def show(step: int, judged: Judged) -> None:
        asked = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts["dev"][:SAMPLES]]
        told = [decode(tokenizer, answer) for answer in judged.answers[:SAMPLES]]
        rows = zip(asked, told, judged.rewards.tolist(), judged.kl.tolist(), strict=False)
        samples = [dict(zip(("prompt", "answer", "reward", "kl"), row, strict=True)) for row in rows]
        stage.log_json(f"samples/step-{step:05}.json", samples)

    policy = NewPolicy(params.ppo.method, params.sft, below.parts, start)
    actors = Actors(model, policy=policy, reference=SFT, reward=REWARD, beneath=beneath)
    numbers = ppo.train(
        actors,
        tokenizer,
        prompts["train"],
        prompts["dev"],
        params.ppo,
        seed=params.seed,
        log=stage.log,
        progress=stage.progress,
        log_speed=stage.log_speed,
        show=show,
        checkpoints=checkpoints,
    )
    actors.finish()
    save_trained(
        actors.model,
        params.ppo.method,
        "models/ppo",
        below,
        name="policy",
        weights=actors.policy,
        tokenizer=tokenizer,
    )
    stage.log_adapter("models/ppo")
    checkpoints.clear()
    return numbers


def check_reward_model(minimum_accuracy: float) -> None:
    """Refuse a reward model that orders held-out answers little better than chance: PPO would chase noise.

    Raises:
        InputError: its accuracy on the test pairs is below `minimum_accuracy`.
    """
    accuracy = json.loads(Path("metrics/reward.json").read_text(encoding="utf-8"))["test_accuracy"]
    if accuracy < minimum_accuracy:
        raise InputError(
            f"the reward model orders {accuracy:.3f} of the held-out pairs rightly, ppo.minimum_reward_accuracy is "
            f"{minimum_accuracy}: train it longer or on more pairs, or lower the bound"
        )


if __name__ == "__main__":
    main("ppo", run)
