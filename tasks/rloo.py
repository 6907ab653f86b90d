"""RLOO from models/sft against the reward model on the prompts of prepared/rows/ppo; writes models/rloo."""

from tasks import policy
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import rloo

    params = stage.params
    policy.check_reward_model(params, params.rloo.minimum_reward_accuracy)
    return policy.improve(stage, rloo.train, params.rloo, policy.prompts)


if __name__ == "__main__":
    main("rloo", run, shared=True)
