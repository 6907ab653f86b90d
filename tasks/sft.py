"""Supervised fine-tuning of a LoRA on models/base with the rows of prepared/rows/sft; writes models/sft."""

from tasks.base_model import load_base
from tasks.stage import Stage, main
from tasks.tokenized import tokenized


def run(stage: Stage) -> dict[str, float]:
    from glm.models.saving import save_adapter
    from glm.training import sft

    params = stage.params
    model, tokenizer = load_base(params)
    examples = {split: tokenized(stage, tokenizer, "sft", split) for split in ("train", "dev")}
    adapted, numbers = sft.train(
        model,
        tokenizer,
        examples["train"],
        examples["dev"],
        params.sft,
        seed=params.seed,
        log=stage.log,
        log_speed=stage.log_speed,
        progress=stage.progress,
    )
    save_adapter(adapted, "models/sft")
    stage.log_adapter("models/sft")
    return numbers | {"truncated_rows": examples["train"].truncated}


if __name__ == "__main__":
    main("sft", run)
