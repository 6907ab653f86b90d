"""RAFT from models/sft against the reward model on the prompts of prepared/rows/ppo; writes models/raft."""

from tasks import policy
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import raft

    params = stage.params
    policy.check_reward_model(params, params.raft.minimum_reward_accuracy)
    return policy.improve(stage, raft.train, params.raft, policy.prompts)


if __name__ == "__main__":
    main("raft", run)
