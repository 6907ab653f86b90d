"""DPO from models/sft on the ranked answers of prepared/rows/reward; writes models/dpo."""

from tasks import policy
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import dpo

    options = stage.params.dpo
    return policy.improve(
        stage, dpo.train, options, policy.rankings, method=options.method, resume=options.resume_lora_training
    )


if __name__ == "__main__":
    main("dpo", run, shared=True)
