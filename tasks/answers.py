"""The held-out questions, and what a model makes of them; evaluate_sft and evaluate measure alike."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm.data.rows import Row, question_of, read_split, spread
from tasks.stage import Stage
from tasks.tokenized import ROWS, tokenized

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glm.data.cache import TokenizedRows

SAMPLES = 3  # questions that are also answered as the chat does: a small model's greedy answers go in circles
CHAT_SAMPLING = {"do_sample": True, "temperature": 0.95, "top_p": 0.7}


@dataclass(frozen=True)
class Questions:
    """The test split of the SFT data: all of it for the loss, `evaluate.max_samples` rows to be answered."""

    examples: "TokenizedRows"
    rows: list[Row]  # those that are answered
    prompts: list[list[int]]
    labels: list[str]

    @property
    def sampled(self) -> range:
        """The positions among `rows` of the questions that are also answered by sampling."""
        return range(0, len(self.rows), max(1, len(self.rows) // SAMPLES))[:SAMPLES]


@dataclass(frozen=True)
class Answers:
    """What one model made of the questions."""

    metrics: dict[str, float]  # loss, bleu-4, rouge-1, rouge-2, rouge-l, accuracy
    greedy: list[str]
    sampled: list[str]


def read_questions(stage: Stage, tokenizer: "PreTrainedTokenizerBase") -> Questions:
    """The questions as text and as tokens."""
    from glm.data.encode import prompt_ids

    params = stage.params
    rows = spread(read_split(ROWS, "sft", "test"), params.evaluate.max_samples)
    return Questions(
        examples=tokenized(stage, tokenizer, "sft", "test"),
        rows=rows,
        prompts=[prompt_ids(tokenizer, row["messages"][:-1], params.data)[0] for row in rows],
        labels=[row["messages"][-1]["content"] for row in rows],
    )


def answer(
    stage: Stage, model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase", questions: Questions
) -> Answers:
    """Loss on the reference answers (nats a token), and the answers with their BLEU and ROUGE.

    Greedy answers are the ones that are scored: they repeat from run to run, unlike the reference system's samples.
    """
    import torch

    from glm.evaluation.text_metrics import corpus_scores
    from glm.generation.decode import decode, generate
    from glm.training import sft

    options = stage.params.evaluate
    loss = sft.mean_loss(model, tokenizer, questions.examples, options.batch_size)
    limits = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    greedy = [decode(tokenizer, ids) for ids in generate(model, tokenizer, questions.prompts, **limits)]
    torch.manual_seed(stage.params.seed)
    drawn = generate(model, tokenizer, [questions.prompts[at] for at in questions.sampled], **limits, **CHAT_SAMPLING)
    return Answers(
        metrics={"loss": loss, **corpus_scores(greedy, questions.labels)},
        greedy=greedy,
        sampled=[decode(tokenizer, ids) for ids in drawn],
    )


def predictions(questions: Questions, answers: dict[str, Answers]) -> list[dict[str, str]]:
    """Every greedy answer with the row's id, its question and its label: rows of predictions.jsonl."""
    return [
        {"id": row["id"], "prompt": question_of(row), "label": label}
        | {who: given.greedy[at] for who, given in answers.items()}
        for at, (row, label) in enumerate(zip(questions.rows, questions.labels, strict=True))
    ]


def samples(questions: Questions, answers: dict[str, Answers]) -> list[dict[str, str]]:
    """A few sampled answers side by side: samples.json."""
    return [
        {"prompt": question_of(questions.rows[at])} | {who: given.sampled[turn] for who, given in answers.items()}
        for turn, at in enumerate(questions.sampled)
    ]
