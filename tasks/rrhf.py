"""RRHF from models/sft on the ranked answers of prepared/rows/reward; writes models/rrhf."""

from tasks import policy
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.training import rrhf

    options = stage.params.rrhf
    return policy.improve(
        stage, rrhf.train, options, policy.rankings, method=options.method, resume=options.resume_lora_training
    )


if __name__ == "__main__":
    main("rrhf", run, shared=True)
