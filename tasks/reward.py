"""Train the reward model, a LoRA and a head on models/base, on the ranked answers of prepared/rows/reward."""

from pathlib import Path

from glm.files import replace_folder
from tasks.base_model import BASE, load_base
from tasks.stage import Stage, main
from tasks.tokenized import tokenized


def run(stage: Stage) -> dict[str, float]:
    from glm.training import reward

    params = stage.params
    model, tokenizer = load_base(params)
    examples = {split: tokenized(stage, tokenizer, "reward", split) for split in ("train", "dev", "test")}
    trained, numbers = reward.train(
        model,
        tokenizer,
        examples["train"],
        examples["dev"],
        params.reward,
        lora=params.sft,
        sft_adapter=Path("models/sft") if params.reward.init == "sft" else None,
        seed=params.seed,
        log=stage.log,
        log_speed=stage.log_speed,
        progress=stage.progress,
    )
    held_out = reward.evaluate(trained, tokenizer, examples["test"], params.reward.per_device_eval_batch_size)
    with replace_folder("models/reward") as folder:
        reward.save(trained, folder, BASE)
    stage.log_reward_model("models/reward")
    numbers |= {"truncated_rows": examples["train"].truncated}
    return numbers | {f"test_{name}": value for name, value in held_out.items()}


if __name__ == "__main__":
    main("reward", run)
