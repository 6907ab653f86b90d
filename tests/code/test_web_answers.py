"""Answers for visitors of the web page who go away: gradio closes the generators of a page that is closed."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra `web` is not installed")

from apps.models import resolve
from apps.serve.feedback import FeedbackStore
from apps.web import rank
from apps.web.chat import Side, stream, wait_for_none
from apps.web.loaded import Loaded, Models
from apps.web.texts import Texts
from glm.errors import InputError
from glm.serving.engine import Engine
from tests.code.running_server import without_end

TINY = str(Path(__file__).parents[1] / "golden" / "chatglm2-e2e")


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Loaded]:
    """A model that answers one at a time, so that others wait."""
    resolved = resolve(TINY)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(*resolved.load(), max_batch=1))
        yield Loaded(resolved, engine, FeedbackStore(tmp_path, ""), stack)


def test_rankings_that_nobody_waits_for_are_cancelled(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "LOOK_SECONDS", 0.01)
    state = rank.Ranking(loaded)
    with without_end(loaded.engine):
        answers = rank.answers(state, "写一条酒店评论", 8, temperature=2.0, tokens=400)
        next(answers)  # though no answer is there yet, so that it can be closed
        assert state.answers == []
        answers.close()
    assert len(state.requests) == 8 and all(request.cancelled for request in state.requests)


@pytest.fixture
def models() -> Iterator[Models]:
    models = Models()
    yield models
    models.close()


def test_an_answer_to_what_was_cleared_does_not_show(models: Models) -> None:
    side = Side(TINY, messages=[{"role": "user", "content": "写一条酒店评论"}])
    answer = stream(side, models, "", 2.0, 1.0, 400)
    next(answer)
    side.messages, side.ids = [], []  # as the button does
    assert list(answer) == [] and side.messages == [] and not side.answering


def test_a_second_answer_waits_for_the_first(models: Models) -> None:
    left, right = Side(TINY, messages=[{"role": "user", "content": "写一条酒店评论"}]), Side()
    answer = stream(left, models, "", 2.0, 1.0, 400)
    next(answer)
    assert list(stream(left, models, "", 2.0, 1.0, 400)) == []  # a button pressed twice
    with pytest.raises(InputError, match="on its way"):
        wait_for_none(left, right, Texts("en"))
    answer.close()
    wait_for_none(left, right, Texts("en"))


def test_a_chat_that_nobody_reads_is_cancelled(models: Models) -> None:
    side = Side(TINY, messages=[{"role": "user", "content": "写一条酒店评论"}])
    answer = stream(side, models, "", 2.0, 1.0, 400)
    next(answer)
    assert side.chat and side.chat.request
    request = side.chat.request
    answer.close()
    assert request.cancelled and side.chat is None
