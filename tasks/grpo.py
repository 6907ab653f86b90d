"""GRPO from models/sft against the reward model on the prompts of prepared/rows/ppo; writes models/grpo."""

from tasks import policy
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import grpo

    params = stage.params
    policy.check_reward_model(params, params.grpo.minimum_reward_accuracy)
    return policy.improve(stage, grpo.train, params.grpo, policy.prompts)


if __name__ == "__main__":
    main("grpo", run, shared=True)
