"""Train a second reward model, by which policies are compared and against which none is trained.

What a policy gains by fooling the reward model, it does not gain here (Gao et al. 2023, "Scaling laws for reward model
overoptimization"). The judge has the parameters of `reward`, but starts fresh on the base and not from SFT, and has
another seed, which orders the rows anew. Its rows are the same: on few rows, two halves would make two poor judges.
"""

from pathlib import Path

from tasks.base_model import foundation, load_base_tokenizer, load_on
from tasks.stage import Stage, main
from tasks.tokenized import tokenized

CHECKPOINTS = Path(".cache/checkpoints/reward_judge")


def run(stage: Stage) -> dict[str, float]:
    from glm.models.saving import save_trained
    from glm.training import reward
    from glm.training.checkpoint import Checkpoints

    params = stage.params
    below, _ = foundation(params).starting(params.reward.method, resume=False)
    below.check(params.reward.method)
    model, tokenizer = load_on(below), load_base_tokenizer()
    examples = {split: tokenized(stage, tokenizer, "reward", split) for split in ("train", "dev", "test")}
    checkpoints = Checkpoints(CHECKPOINTS / stage.fingerprint, keep=params.reward.save_total_limit)
    trained, numbers = reward.train(
        model,
        tokenizer,
        examples["train"],
        examples["dev"],
        params.reward,
        shape=params.sft,
        checkpoints=checkpoints,
        seed=params.seed + 1,
        log=stage.log,
        log_speed=stage.log_speed,
        progress=stage.progress,
    )
    held_out = reward.evaluate(trained, tokenizer, examples["test"], params.reward.per_device_eval_batch_size)
    score = trained.score
    save_trained(trained.backbone, params.reward.method, "models/reward_judge", below, tokenizer=tokenizer, score=score)
    checkpoints.clear()
    return numbers | {f"test_{name}": value for name, value in held_out.items()}


if __name__ == "__main__":
    main("reward_judge", run)
