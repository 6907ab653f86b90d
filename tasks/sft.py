"""Supervised fine-tuning of a LoRA on models/base with the rows of prepared/rows/sft; writes models/sft."""

from glm.data.rows import read_split
from tasks.base_model import load_base
from tasks.stage import Stage, main

ROWS = "prepared/rows"


def run(stage: Stage) -> dict[str, float]:
    from glm.data.encode import dialogue
    from glm.models.saving import save_adapter
    from glm.training import sft

    params = stage.params
    model, tokenizer = load_base(params)
    examples = {}
    for split in ("train", "dev"):
        rows = read_split(ROWS, "sft", split)
        examples[split] = [dialogue(tokenizer, row["messages"], params.data) for row in rows]
        stage.log_dataset("sft", f"{ROWS}/sft/{split}.jsonl", split=split, rows=len(rows))
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
    return numbers | {"truncated_rows": sum(example["truncated"] for example in examples["train"])}


if __name__ == "__main__":
    main("sft", run)
