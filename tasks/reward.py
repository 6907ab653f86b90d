"""Train the reward model, by `reward.method` and with a head, on the ranked answers of prepared/rows/reward.

It stands on models/sft or models/base. A run that was killed goes on from its last checkpoint when the same command is
given again on the same inputs.
"""

from itertools import takewhile
from pathlib import Path

from tasks.base_model import foundation, load_base_tokenizer, load_on
from tasks.stage import Stage, main
from tasks.tokenized import tokenized

CHECKPOINTS = Path(".cache/checkpoints/reward")


def run(stage: Stage) -> dict[str, float]:
    from glm.evaluation import reward_report
    from glm.models.lineage import above
    from glm.models.saving import save_trained
    from glm.training import reward
    from glm.training.checkpoint import Checkpoints

    params = stage.params
    beneath = above("models/sft") if params.reward.init == "sft" else foundation(params)
    below, start = beneath.starting(params.reward.method, resume=params.reward.resume_lora_training)
    below.check(params.reward.method)
    model, tokenizer = load_on(below), load_base_tokenizer()
    examples = {split: tokenized(stage, tokenizer, "reward", split) for split in ("train", "dev", "test")}
    checkpoints = Checkpoints(CHECKPOINTS / stage.fingerprint, keep=params.reward.save_total_limit)
    trained, numbers = reward.train(
        model,
        tokenizer,
        examples["train"],
        examples["dev"],
        params.reward,
        shape=params.sft,
        start=start,
        checkpoints=checkpoints,
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
    score = trained.score
    save_trained(trained.backbone, params.reward.method, "models/reward", below, tokenizer=tokenizer, score=score)
    stage.log_reward_model("models/reward")
    checkpoints.clear()
    numbers |= {"truncated_rows": examples["train"].truncated}
    return numbers | {f"test_{name}": value for name, value in held_out.items()}


def answer_lengths(sequences: list[list[int]]) -> list[int]:
    """Tokens of each answer to one prompt, what all of them begin with left out."""
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))
    return [len(sequence) - shared for sequence in sequences]


if __name__ == "__main__":
    main("reward", run)
