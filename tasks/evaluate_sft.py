"""Compare base and SFT on the test split: loss, and BLEU and ROUGE of greedy answers.

A step of its own, so that methods of SFT can be compared without a reward model, and a change of PPO does not ask base
and SFT again. Writes reports/evaluate_sft: predictions.jsonl (every greedy answer with its row id and label) and
samples.json (three questions, answered side by side as the chat does).
"""

from glm.data.held_out import check_disjoint
from glm.files import replace_folder, write_json, write_jsonl
from tasks.answers import Answers, answer, predictions, read_questions, samples
from tasks.base_model import load_base, load_on
from tasks.stage import Stage, main
from tasks.tokenized import ROWS


def run(stage: Stage) -> dict[str, float]:
    from glm.models.lineage import above

    check_disjoint(ROWS, "sft")
    base, tokenizer = load_base(stage.params)
    questions = read_questions(stage, tokenizer)
    answers: dict[str, Answers] = {}
    stage.progress(0, 2, "base")
    answers["base"] = answer(stage, base, tokenizer, questions)
    stage.progress(1, 2, "SFT")
    del base
    answers["sft"] = answer(stage, load_on(above("models/sft")), tokenizer, questions)
    stage.progress(2, 2)
    with replace_folder("reports/evaluate_sft") as folder:
        write_jsonl(folder / "predictions.jsonl", predictions(questions, answers))
        write_json(folder / "samples.json", samples(questions, answers))
    stage.log_artifact("reports/evaluate_sft")
    return {f"{who}.{name}": value for who, given in answers.items() for name, value in given.metrics.items()}


if __name__ == "__main__":
    main("evaluate_sft", run)
