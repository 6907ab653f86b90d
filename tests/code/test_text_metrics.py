"""BLEU and ROUGE are the reference system's to the last digit that it prints."""

import pytest

from glm.evaluation.text_metrics import NAMES, corpus_scores, score

# prediction, label → rouge-1, rouge-2, rouge-l, bleu-4, accuracy, computed with the reference's own code and packages
VECTORS = [
    ("今天天气很好，我们去公园散步。", "今天天气不错，我们去公园散步吧。", 77.7778, 50.0, 77.7778, 61.8027, 0),
    ("你好世界", "你好", 66.6667, 0, 66.6667, 31.9472, 1),
    ("人工智能", "人工智能", 100, 0, 100, 100, 1),
    ("hello world foo", "hello world", 80.0, 66.6667, 80.0, 70.1206, 1),
    (
        "这款粉红色条纹连衣裙精美大方",
        "这款粉红色条纹连衣裙精美大方，充满青春活力气息，十分唯美大气，尽显女性俏丽活泼感。",
        51.8519,
        44.4444,
        48.2759,
        14.5356,
        0,
    ),
    ("", "", 0, 0, 0, 0, 0),
    ("   ", "你好", 0, 0, 0, 0, 0),
    ("abc", "人工智能", 0, 0, 0, 0, 0),
]


@pytest.mark.parametrize("vector", VECTORS)
def test_vectors_of_the_reference(vector: tuple) -> None:
    prediction, label, *expected = vector
    assert score(prediction, label) == dict(zip(NAMES, expected, strict=True))


def test_a_corpus_score_is_the_mean_over_pairs() -> None:
    predictions, labels = [v[0] for v in VECTORS[:3]], [v[1] for v in VECTORS[:3]]
    for position, name in enumerate(NAMES):
        mean = sum(vector[2 + position] for vector in VECTORS[:3]) / 3
        assert corpus_scores(predictions, labels)[name] == pytest.approx(mean)


def test_lists_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        corpus_scores(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        corpus_scores([], [])
