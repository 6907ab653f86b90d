"""Compare base, SFT and the policy, named after its algorithm, on the test split.

Loss on the reference answers, BLEU and ROUGE of greedy answers, those of base and SFT as evaluate_sft measured them;
reward and KL of sampled ones; and how the judge, a reward model that no policy was trained against, sees the latter:
its score, the gain over SFT and the share of prompts won against SFT, both with their 95 % interval. Writes
reports/evaluate: predictions.jsonl (every greedy answer with its row id and label) and samples.json (three questions,
answered side by side as the chat does).
"""

import json
from pathlib import Path
from statistics import fmean

from glm.data.held_out import check_disjoint
from glm.data.rows import read_split, spread
from glm.files import read_jsonl, replace_folder, write_json, write_jsonl
from tasks.answers import answer, predictions, read_questions, samples
from tasks.base_model import foundation, load_base_tokenizer, load_shared
from tasks.rewards import load_scorer
from tasks.stage import Stage, main
from tasks.tokenized import ROWS

BEFORE = Path("reports/evaluate_sft")


def run(stage: Stage) -> dict[str, float]:
    from glm.data.encode import end_id, prompt_ids
    from glm.evaluation.win_rate import mean_gain, win_rate
    from glm.models.lineage import chain
    from glm.training import policy_eval
    from glm.training.actors import Actors
    from glm.training.batch import batch_of

    params, options = stage.params, stage.params.evaluate
    algorithm: str = params.algorithm
    adapters = {"base": "start", "sft": "reference", algorithm: "policy"}  # who is compared, and its adapter
    check_disjoint(ROWS, "ppo")
    metrics = read_metrics("evaluate_sft")
    metrics |= {
        f"{name}.accuracy": read_metrics(step)["test_accuracy"]
        for name, step in (("reward", "reward"), ("judge", "reward_judge"))
    }
    sft_model, reward, judge, policy = (Path("models", name) for name in ("sft", "reward", "reward_judge", algorithm))
    shared = [foundation(params).parts, *(chain(folder) for folder in (sft_model, reward, judge, policy))]
    base, beneath = load_shared(params, *shared)
    tokenizer = load_base_tokenizer()
    actors = Actors(
        base,
        policy=policy,
        reference=sft_model,
        reward=reward,
        beneath=beneath,
        scorer=load_scorer(params, tokenizer),
        judge=judge,
    )
    actors.variants.add_chain("start", foundation(params).parts)  # model.adapters, which SFT may have gone on with
    steps = len(adapters) + 1

    stage.progress(0, steps, f"{algorithm}: loss and greedy answers")
    questions = read_questions(stage, tokenizer)
    actors.use("policy")
    answers = {algorithm: answer(stage, actors.model, tokenizer, questions)}
    metrics |= {f"{algorithm}.{name}": value for name, value in answers[algorithm].metrics.items()}

    prompt_rows = spread(read_split(ROWS, "ppo", "test"), options.max_samples)
    prompts = [prompt_ids(tokenizer, row["prompt"], params.data)[0] for row in prompt_rows]
    stage.log_dataset("ppo", f"{ROWS}/ppo/test.jsonl", split="test", rows=len(prompts))
    scores: dict[str, list[float]] = {}  # by the judge
    for number, (who, adapter) in enumerate(adapters.items(), start=1):
        stage.progress(number, steps, f"{who}: reward and KL")
        judged = policy_eval.judge(actors, tokenizer, prompts, options, seed=params.seed, adapter=adapter)
        batch = batch_of(prompts, judged.answers, actors.model.device)
        scores[who] = actors.judge_score(batch).tolist()
        found = policy_eval.summary(judged, end_id(tokenizer)) | {"judge": fmean(scores[who])}
        metrics |= {f"{who}.{name}": value for name, value in found.items()}
    for who in ("base", algorithm):
        against_sft = win_rate(scores[who], scores["sft"]) | mean_gain(scores[who], scores["sft"], params.seed)
        metrics |= {f"{who}.{name}": value for name, value in against_sft.items()}
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
