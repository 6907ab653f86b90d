"""Compare base, SFT and PPO on the test split.

Reward and KL of sampled answers; loss on the reference answers, BLEU and ROUGE of greedy ones, those of base and SFT as
evaluate_sft measured them. Writes reports/evaluate: predictions.jsonl (every greedy answer with its row id and label)
and samples.json (three questions, answered side by side as the chat does).
"""

import json
from pathlib import Path

from glm.data.held_out import check_disjoint
from glm.data.rows import read_split
from glm.files import read_jsonl, replace_folder, write_json, write_jsonl
from tasks.answers import answer, predictions, read_questions, samples
from tasks.base_model import foundation, load_base_tokenizer, load_shared
from tasks.stage import Stage, main
from tasks.tokenized import ROWS

BEFORE = Path("reports/evaluate_sft")
ADAPTERS = {"base": "base", "sft": "reference", "ppo": "policy"}  # who is compared, and its adapter among the actors


def run(stage: Stage) -> dict[str, float]:
    from glm.data.encode import prompt_ids
    from glm.models.lineage import chain
    from glm.training import policy_eval
    from glm.training.actors import Actors

    params, options = stage.params, stage.params.evaluate
    check_disjoint(ROWS, "ppo")
    metrics = read_metrics("evaluate_sft") | {"reward.accuracy": read_metrics("reward")["test_accuracy"]}
    models = {name: Path("models", name) for name in ("sft", "reward", "ppo")}
    base, beneath = load_shared(params, foundation(params).parts, *(chain(folder) for folder in models.values()))
    tokenizer = load_base_tokenizer()
    actors = Actors(base, policy=models["ppo"], reference=models["sft"], reward=models["reward"], beneath=beneath)
    steps = len(ADAPTERS) + 1

    stage.progress(0, steps, "ppo: loss and greedy answers")
    questions = read_questions(stage, tokenizer)
    actors.use("policy")
    answers = {"ppo": answer(stage, actors.model, tokenizer, questions)}
    metrics |= {f"ppo.{name}": value for name, value in answers["ppo"].metrics.items()}

    prompt_rows = read_split(ROWS, "ppo", "test")[: options.max_samples]
    prompts = [prompt_ids(tokenizer, row["prompt"], params.data)[0] for row in prompt_rows]
    stage.log_dataset("ppo", f"{ROWS}/ppo/test.jsonl", split="test", rows=len(prompts))
    for number, (who, adapter) in enumerate(ADAPTERS.items(), start=1):
        stage.progress(number, steps, f"{who}: reward and KL")
        found = policy_eval.evaluate(actors, tokenizer, prompts, options, seed=params.seed, adapter=adapter)
        metrics |= {f"{who}.{name}": value for name, value in found.items()}
    stage.progress(steps, steps)

    rows = zip(read_jsonl(BEFORE / "predictions.jsonl"), predictions(questions, answers), strict=True)
    shown = zip(json.loads((BEFORE / "samples.json").read_text("utf-8")), samples(questions, answers), strict=True)
    with replace_folder("reports/evaluate") as folder:
        write_jsonl(folder / "predictions.jsonl", (before | after for before, after in rows))
        write_json(folder / "samples.json", [before | after for before, after in shown])
    stage.log_artifact("reports/evaluate")
    return metrics


def read_metrics(step: str) -> dict[str, float]:
    """The metrics of an earlier step."""
    return json.loads(Path("metrics", f"{step}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main("evaluate", run)
