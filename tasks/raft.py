"""RAFT from models/sft against the reward model on the prompts of prepared/rows/ppo; writes models/raft."""

from tasks import policy
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import raft

    params, options = stage.params, stage.params.raft
    policy.check_reward_model(params, options.minimum_reward_accuracy)
    return policy.improve(
        stage, raft.train, options, policy.prompts, method=options.method, resume=options.resume_lora_training
    )


if __name__ == "__main__":
    main("raft", run, shared=True)
