"""Train the reward model, by `reward.method` and with a head, on the ranked answers of prepared/rows/reward.

It stands on models/sft or models/base.
"""

from tasks import reward_training
from tasks.base_model import foundation
from tasks.stage import Stage, main


def run(stage: Stage) -> dict[str, float]:
    from glm.evaluation import reward_report
    from glm.models.lineage import above
    from glm.training import reward

    params = stage.params
    beneath = above("models/sft") if params.reward.init == "sft" else foundation(params)
    below, start = beneath.starting(params.reward.method, resume=params.reward.resume_lora_training)
    trained = reward_training.train(stage, below, start=start, seed=params.seed)
    if stage.follows:
        return trained.numbers
    test, size = trained.examples["test"], params.reward.per_device_eval_batch_size
    scores = reward.scores_of_examples(trained.model, trained.tokenizer, test, size)
    sizes = [len(example["sequences"]) for example in test]
    lengths = [
        len(sequence) - start
        for example in test
        for sequence, start in zip(example["sequences"], example["starts"], strict=True)
    ]
    held_out = reward.ranking_metrics(scores, sizes) | reward_report.report(scores.numpy(), sizes, lengths)
    stage.log_figure("reward_report.png", reward_report.draw(scores.numpy(), sizes, lengths, "held-out rankings"))
    reward_training.save(stage, trained, "models/reward")
    stage.log_reward_model("models/reward")
    trained.checkpoints.clear()
    numbers = trained.numbers | {"truncated_rows": trained.examples["train"].truncated}
    return numbers | {f"test_{name}": value for name, value in held_out.items()}


if __name__ == "__main__":
    main("reward", run, shared=True)
