"""Train the reward model, a LoRA and a head on models/base, on the ranked answers of prepared/rows/reward."""

from itertools import takewhile
from pathlib import Path

from glm.files import replace_folder
from tasks.base_model import BASE, load_base
from tasks.stage import Stage, main
from tasks.tokenized import tokenized


def run(stage: Stage) -> dict[str, float]:
    from glm.evaluation import reward_report
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
    scores = reward.scores_of_examples(trained, tokenizer, examples["test"], params.reward.per_device_eval_batch_size)
    sizes = [len(example["sequences"]) for example in examples["test"]]
    lengths = [length for example in examples["test"] for length in answer_lengths(example["sequences"])]
    held_out = reward.ranking_metrics(scores, sizes) | reward_report.report(scores.numpy(), sizes, lengths)
    stage.log_figure("reward_report.png", reward_report.draw(scores.numpy(), sizes, lengths, "held-out rankings"))
    with replace_folder("models/reward") as folder:
        reward.save(trained, folder, BASE)
    stage.log_reward_model("models/reward")
    numbers |= {"truncated_rows": examples["train"].truncated}
    return numbers | {f"test_{name}": value for name, value in held_out.items()}


def answer_lengths(sequences: list[list[int]]) -> list[int]:
    """Tokens of each answer to one prompt, what all of them begin with left out."""
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))
    return [len(sequence) - shared for sequence in sequences]


if __name__ == "__main__":
    main("reward", run)
