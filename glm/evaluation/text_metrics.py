"""BLEU-4, ROUGE and accuracy of Chinese answers, exactly as ChatGLM Efficient Tuning defines them.

Numbers of the reference system stay comparable: ROUGE over jieba's words (package rouge_chinese, the f value), BLEU-4
over characters with NLTK's smoothing method 3, both times 100 and rounded to 4 digits an answer; accuracy is 1 where
the answer begins with the label (times 1). A corpus score is the mean over its pairs.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_chinese import Rouge

NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "accuracy")


def score(prediction: str, label: str) -> dict[str, float]:
    """All metrics of one answer against one label; keys as in NAMES."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    bleu = 0.0
    if prediction and label:
        bleu = sentence_bleu([list(label)], list(prediction), smoothing_function=SmoothingFunction().method3)
    return {
        **_rouge(prediction, label),
        "bleu-4": round(bleu * 100, 4),
        "accuracy": float(bool(label) and prediction.startswith(label)),
    }


def corpus_scores(predictions: list[str], labels: list[str]) -> dict[str, float]:
    """The mean of each metric over pairs of answer and label.

    Raises:
        ValueError: the lists are empty or differ in length.
    """
    if not predictions or len(predictions) != len(labels):
        raise ValueError(f"need as many labels as predictions, at least one: {len(predictions)} and {len(labels)}")
    scores = [score(prediction, label) for prediction, label in zip(predictions, labels, strict=True)]
    return {name: sum(values[name] for values in scores) / len(scores) for name in NAMES}


def _rouge(prediction: str, label: str) -> dict[str, float]:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it reports on stderr that it reads its dictionary
    words = [" ".join(jieba.cut(text)) for text in (prediction, label)]
    if not all(text.split() for text in words):
        return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    found = _scorer().get_scores(*words)[0]
    return {name: round(found[name]["f"] * 100, 4) for name in ("rouge-1", "rouge-2", "rouge-l")}


@cache
def _scorer() -> "Rouge":
    from rouge_chinese import Rouge

    return Rouge()
