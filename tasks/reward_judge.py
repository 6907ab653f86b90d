"""Train a second reward model, by which policies are compared and against which none is trained.

What a policy gains by fooling the reward model, it does not gain here (Gao et al. 2023, "Scaling laws for reward model
overoptimization"). The judge has the parameters of `reward`, but a fresh LoRA on the base in place of a copy of SFT's,
and another seed, which orders the rows anew. Its rows are the same: on few rows, two halves would make two poor judges.
"""

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
        sft_adapter=None,
        seed=params.seed + 1,
        log=stage.log,
        log_speed=stage.log_speed,
        progress=stage.progress,
    )
    held_out = reward.evaluate(trained, tokenizer, examples["test"], params.reward.per_device_eval_batch_size)
    with replace_folder("models/reward_judge") as folder:
        reward.save(trained, folder, BASE)
    return numbers | {f"test_{name}": value for name, value in held_out.items()}


if __name__ == "__main__":
    main("reward_judge", run)
