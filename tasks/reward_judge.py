"""Train a second reward model, by which policies are compared and against which none is trained.

What a policy gains by fooling the reward model, it does not gain here (Gao et al. 2023, "Scaling laws for reward model
overoptimization"). The judge has the parameters of `reward`, but starts fresh on the base and not from SFT, and has
another seed, which orders the rows anew. Its rows are the same: on few rows, two halves would make two poor judges.
"""

from tasks import reward_training
from tasks.base_model import foundation
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import reward

    params = stage.params
    below, _ = foundation(params).starting(params.reward.method, resume=False)
    trained = reward_training.train(stage, below, start=None, seed=params.seed + 1)
    if stage.follows:
        return trained.numbers
    size = params.reward.per_device_eval_batch_size
    held_out = reward.evaluate(trained.model, trained.tokenizer, trained.examples["test"], size)
    reward_training.save(stage, trained, "models/reward_judge")
    trained.checkpoints.clear()
    return trained.numbers | {f"test_{name}": value for name, value in held_out.items()}


if __name__ == "__main__":
    main("reward_judge", run, shared=True)
