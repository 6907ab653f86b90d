"""Compare base, SFT and the policy, named after its algorithm, on the test split.

Loss on the reference answers, BLEU and ROUGE of greedy answers, reward and KL of sampled ones; and how the judge, a
reward model that no policy was trained against, sees them: its score, the gain over SFT and the share of prompts won
against SFT, both with their 95 % interval. Writes reports/evaluate:
predictions.jsonl (every greedy answer with its row id and reference) and samples.json (three prompts, answered side by
side with the chat's sampling, since a small model's greedy answers go in circles).
"""

import json
from pathlib import Path

from glm.data.rows import question_of, read_split
from glm.files import replace_folder, write_json, write_jsonl
from tasks.base_model import foundation, load_base_tokenizer, load_shared
from tasks.rewards import load_scorer
from tasks.stage import Stage, main
from tasks.tokenized import ROWS, tokenized

SAMPLES = 3
CHAT_SAMPLING = {"do_sample": True, "temperature": 0.95, "top_p": 0.7}


def run(stage: Stage) -> dict[str, float]:
    import torch

    from glm.data.encode import end_id, prompt_ids
    from glm.evaluation.text_metrics import corpus_scores
    from glm.evaluation.win_rate import mean_gain, win_rate
    from glm.generation.decode import decode, generate
    from glm.models.lineage import chain
    from glm.training import policy_eval, sft
    from glm.training.actors import Actors, pack

    params, options = stage.params, stage.params.evaluate
    adapters = {"base": "base", "sft": "reference", params.algorithm: "policy"}  # who is compared, and its adapter
    sft_model, reward, judge, policy = (
        Path("models", name) for name in ("sft", "reward", "reward_judge", params.algorithm)
    )
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
    rows = read_split(ROWS, "sft", "test")
    examples = tokenized(stage, tokenizer, "sft", "test")
    asked = rows[:: max(1, len(rows) // options.max_samples)][: options.max_samples]  # spread: files are often sorted
    prompts = [prompt_ids(tokenizer, row["messages"][:-1], params.data)[0] for row in asked]
    labels = [row["messages"][-1]["content"] for row in asked]
    policy_rows = read_split(ROWS, "ppo", "test")[: options.max_samples]
    policy_prompts = [prompt_ids(tokenizer, row["prompt"], params.data)[0] for row in policy_rows]
    stage.log_dataset("ppo", f"{ROWS}/ppo/test.jsonl", split="test", rows=len(policy_rows))

    metrics = {
        f"{name}.accuracy": json.loads(Path(f"metrics/{step}.json").read_text(encoding="utf-8"))["test_accuracy"]
        for name, step in (("reward", "reward"), ("judge", "reward_judge"))
    }
    shown = range(0, len(asked), max(1, len(asked) // SAMPLES))[:SAMPLES]
    samples = [{"prompt": question_of(asked[at])} for at in shown]
    texts: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}  # by the judge
    for number, (who, adapter) in enumerate(adapters.items()):
        stage.progress(3 * number, 3 * len(adapters), f"{who}: loss")
        actors.use(adapter)
        metrics[f"{who}.loss"] = sft.mean_loss(actors.model, tokenizer, examples, options.batch_size)
        stage.progress(3 * number + 1, 3 * len(adapters), f"{who}: greedy answers")
        limits = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
        texts[who] = [decode(tokenizer, answer) for answer in generate(actors.model, tokenizer, prompts, **limits)]
        torch.manual_seed(params.seed)
        drawn = generate(actors.model, tokenizer, [prompts[at] for at in shown], **limits, **CHAT_SAMPLING)
        for sample, answer in zip(samples, drawn, strict=True):
            sample[who] = decode(tokenizer, answer)
        found = corpus_scores(texts[who], labels)
        stage.progress(3 * number + 2, 3 * len(adapters), f"{who}: reward and KL")
        judged = policy_eval.judge(actors, tokenizer, policy_prompts, options, seed=params.seed, adapter=adapter)
        batch = pack(policy_prompts, judged.answers, tokenizer.pad_token_id, actors.model.device)
        scores[who] = actors.judge_score(batch).tolist()
        found |= policy_eval.summary(judged, end_id(tokenizer)) | {"judge": sum(scores[who]) / len(scores[who])}
        metrics |= {f"{who}.{name}": value for name, value in found.items()}
    for who in ("base", params.algorithm):
        against_sft = win_rate(scores[who], scores["sft"]) | mean_gain(scores[who], scores["sft"], params.seed)
        metrics |= {f"{who}.{name}": value for name, value in against_sft.items()}
    stage.progress(3 * len(adapters), 3 * len(adapters))

    predictions = [
        {"id": row["id"], "prompt": question_of(row), "label": label, **{who: texts[who][at] for who in adapters}}
        for at, (row, label) in enumerate(zip(asked, labels, strict=True))
    ]
    with replace_folder("reports/evaluate") as folder:
        write_jsonl(folder / "predictions.jsonl", predictions)
        write_json(folder / "samples.json", samples)
    stage.log_artifact("reports/evaluate")
    return metrics


if __name__ == "__main__":
    main("evaluate", run)
