"""PPO from models/sft against the reward model on the prompts of prepared/rows/ppo; writes models/ppo."""

from tasks import policy
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import ppo

    params, options = stage.params, stage.params.ppo
    policy.check_reward_model(params, options.minimum_reward_accuracy)
    return policy.improve(
        stage, ppo.train, options, policy.prompts, method=options.method, resume=options.resume_lora_training
    )


if __name__ == "__main__":
    main("ppo", run, shared=True)
