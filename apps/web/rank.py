"""Tab Rank: several answers to a prompt, put in order by hand, kept as a ranking for the reward model."""

import queue
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.serve.schema import Feedback
from apps.web.loaded import Loaded, Models
from apps.web.telling import QUIET, told
from apps.web.texts import Texts
from glm.errors import InputError

if TYPE_CHECKING:
    from glm.serving.request import Event, Request

MOST = 8  # answers
LOOK_SECONDS = 1.0


@dataclass
class Ranking:
    """What a visitor is putting in order, the best first."""

    loaded: Loaded | None = None
    prompt: list[dict[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    requests: "list[Request]" = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> "Ranking":  # gradio copies what a visitor begins with
        return Ranking()


def build(text: Texts, models: Models) -> None:
    """The tab's components and events."""
    ranking = gr.State(Ranking())
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            name = gr.Textbox("models/export", label=text("rank.model"), max_lines=1, elem_id="rank-model")
            prompt = gr.Textbox("", label=text("rank.prompt"), lines=4, elem_id="rank-prompt")
            count = gr.Slider(2, MOST, 4, step=1, label=text("rank.count"))
            temperature = gr.Slider(0.1, 2, 1.0, step=0.1, label="temperature", elem_id="rank-temperature")
            tokens = gr.Slider(8, 1024, 128, step=8, label="max_new_tokens")
            with gr.Row():
                generate = gr.Button(text("rank.generate"), variant="primary", elem_id="rank-generate", min_width=100)
                stop = gr.Button(text("chat.stop"), variant="stop", min_width=80)
        with gr.Column(scale=3, min_width=420):
            gr.Markdown(text("rank.about"))
            rows, texts, ups, downs, outs = [], [], [], [], []
            for place in range(MOST):
                with gr.Row(visible=False, equal_height=True, elem_classes="rank-row") as row:
                    texts.append(
                        gr.Textbox(
                            "", label=f"{place + 1}", lines=2, interactive=False, scale=8, elem_id=f"rank-{place}"
                        )
                    )
                    ups.append(gr.Button("▲", size="sm", min_width=40, scale=0, elem_id=f"rank-up-{place}"))
                    downs.append(gr.Button("▼", size="sm", min_width=40, scale=0))
                    outs.append(gr.Button("✕", size="sm", min_width=40, scale=0))
                rows.append(row)
            keep = gr.Button(text("rank.keep"), variant="primary", elem_id="rank-keep", interactive=False)

    shown = [*rows, *texts, keep]

    def begin(name: str, prompt: str, count: float, temperature: float, tokens: float, state: Ranking) -> Iterator[Any]:
        if not prompt.strip():
            raise InputError(text("rank.no_prompt"))
        state.answers = []
        yield show(state)
        state.loaded = models.get("model", name)
        for _ in answers(state, prompt.strip(), int(count), temperature, int(tokens)):
            yield show(state)

    def move(place: int, by: int) -> Any:
        def moved(state: Ranking) -> Any:
            there = place + by
            if 0 <= there < len(state.answers):
                state.answers[place], state.answers[there] = state.answers[there], state.answers[place]
            return show(state)

        return moved

    def drop(place: int) -> Any:
        def dropped(state: Ranking) -> Any:
            del state.answers[place : place + 1]
            return show(state)

        return dropped

    def store(state: Ranking) -> Any:
        if state.loaded is None or len(state.answers) < 2:
            raise InputError(text("rank.too_few"))
        identity = uuid.uuid4().hex
        state.loaded.store.remember(identity, state.prompt, state.answers)
        path = state.loaded.store.add(Feedback(id=identity, ranking=list(range(len(state.answers)))))
        gr.Info(text("kept", file=f"data/feedback/{path.name}"), duration=4)
        state.answers = []
        return show(state)

    def end(state: Ranking) -> None:
        for request in state.requests:
            request.cancel()

    inputs = [name, prompt, count, temperature, tokens, ranking]
    generate.click(told(begin), inputs, shown, concurrency_limit=None, **QUIET)
    stop.click(told(end), ranking, None, **QUIET)
    keep.click(told(store), ranking, shown, **QUIET)
    for place in range(MOST):
        ups[place].click(told(move(place, -1)), ranking, shown, **QUIET)
        downs[place].click(told(move(place, 1)), ranking, shown, **QUIET)
        outs[place].click(told(drop(place)), ranking, shown, **QUIET)


def show(state: Ranking) -> list[Any]:
    """The answers in their places; the rest of the places is hidden."""
    count = len(state.answers)
    rows = [gr.Row(visible=place < count) for place in range(MOST)]
    texts = [*state.answers, *[""] * (MOST - count)]
    return [*rows, *texts, gr.Button(interactive=count > 1)]


def answers(state: Ranking, prompt: str, count: int, temperature: float, tokens: int) -> Iterator[None]:
    """Fill `state.answers` as they come; two equal ones are one."""
    assert state.loaded is not None
    chat = state.loaded.chat("", tokens, temperature, 1.0, None)
    chat.messages.append({"role": "user", "content": prompt})
    state.prompt = chat.messages
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()
    state.requests = [chat.ask(ended.put) for _ in range(count)]
    for request in state.requests:
        request.stream = False
    state.loaded.engine.submit(*state.requests)
    try:
        waiting = count
        while waiting:
            try:
                event = ended.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                yield  # where it stops, and frees its places, if the visitor has closed the page
                continue
            waiting -= 1
            if event.finish_reason == "error":
                raise RuntimeError(event.error)
            if event.text and event.text not in state.answers and event.finish_reason != "cancelled":
                state.answers.append(event.text)
                yield
    finally:
        for request in state.requests:
            request.cancel()
