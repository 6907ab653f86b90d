"""Supervised fine-tuning by `sft.method` on models/base with the rows of prepared/rows/sft; writes models/sft.

A run that was killed goes on from its last checkpoint when the same command is given again on the same inputs.
"""

from tasks.base_model import foundation, load_base_tokenizer, load_on
from tasks.stage import Stage, main
from tasks.tokenized import tokenized


def run(stage: Stage) -> dict[str, float]:
    from glm.models.saving import save_trained
    from glm.training import sft
    from glm.training.checkpoint import Checkpoints

    params = stage.params
    below, start = foundation(params).starting(params.sft.method, resume=params.sft.resume_lora_training)
    below.check(params.sft.method)
    model, tokenizer = load_on(below), load_base_tokenizer()
    examples = {split: tokenized(stage, tokenizer, "sft", split) for split in ("train", "dev")}
    checkpoints = Checkpoints(stage.checkpoint_folder, keep=params.sft.save_total_limit)
    tuned, numbers = sft.train(
        model,
        tokenizer,
        examples["train"],
        examples["dev"],
        params.sft,
        start=start,
        checkpoints=checkpoints,
        strategy=params.launch.strategy,
        seed=params.seed,
        log=stage.log,
        log_speed=stage.log_speed,
        progress=stage.progress,
    )
    if stage.follows:
        return numbers
    save_trained(tuned, params.sft.method, "models/sft", below, tokenizer=tokenizer)
    stage.log_adapter("models/sft")
    checkpoints.clear()
    return numbers | {"truncated_rows": examples["train"].truncated}


if __name__ == "__main__":
    main("sft", run, shared=True)
