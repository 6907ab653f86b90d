"""Tab Chat: the same question to two models, answers side by side as they come, and what is thought of them."""

import copy
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from apps.chat import Chat
from apps.models import KINDS
from apps.serve.feedback import FeedbackStore
from apps.serve.schema import Feedback
from apps.web.loaded import FEEDBACK, Loaded, Models
from apps.web.telling import QUIET, told
from apps.web.texts import Texts
from glm.errors import InputError

SIDES = ("left", "right")
Messages = list[dict[str, str]]


@dataclass
class Side:
    """One of the two dialogues of a visitor."""

    name: str = ""  # of the model
    loaded: Loaded | None = None
    messages: Messages = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # of the answers, as the feedback store knows them
    answering: bool = False  # an answer is on its way, the loading of its model included
    chat: Chat | None = None  # while it is

    def __deepcopy__(self, memo: Any) -> "Side":  # gradio copies what a visitor begins with
        return Side()

    def shown(self) -> Messages:
        return [message for message in self.messages if message["role"] != "system"]


def build(text: Texts, models: Models) -> None:
    """The tab's components and events."""
    sides = {side: gr.State(Side()) for side in SIDES}
    names: dict[str, gr.Textbox] = {}
    boxes: dict[str, gr.Chatbot] = {}
    with gr.Row():
        for side, default in zip(SIDES, ("models/export", ""), strict=True):
            with gr.Column(min_width=380):
                names[side] = gr.Textbox(
                    default,
                    label=text(f"chat.{side}"),
                    info=text("chat.model_info"),
                    max_lines=1,
                    elem_id=f"model-{side}",
                )
                boxes[side] = gr.Chatbot(
                    show_label=False, height=380, elem_id=f"chat-{side}", placeholder=text("chat.empty"),
                    allow_file_downloads=False, render_markdown=False, buttons=["copy"],
                )  # fmt: skip
    question = gr.Textbox(
        "",
        show_label=False,
        placeholder=text("chat.question"),
        lines=2,
        max_lines=8,
        elem_id="question",
        submit_btn=False,
    )
    with gr.Row():
        send = gr.Button(text("chat.send"), variant="primary", elem_id="send", min_width=90)
        stop = gr.Button(text("chat.stop"), variant="stop", elem_id="chat-stop", min_width=90)
        again = gr.Button(text("chat.regenerate"), elem_id="regenerate", min_width=90)
        clear = gr.Button(text("chat.clear"), elem_id="clear", min_width=90)
        better = {
            side: gr.Button(text(f"chat.{side}_better"), elem_id=f"better-{side}", min_width=120) for side in SIDES
        }
    with gr.Accordion(text("chat.settings"), open=False), gr.Row():
        system = gr.Textbox("", label=text("chat.system"), info=text("chat.system_info"), lines=2)
        temperature = gr.Slider(0, 2, 0.95, step=0.05, label="temperature", info=text("chat.temperature_info"))
        top_p = gr.Slider(0.05, 1, 0.7, step=0.05, label="top_p")
        tokens = gr.Slider(8, 1024, 256, step=8, label="max_new_tokens", elem_id="max-new-tokens")

    def take(asked: str, left: Side, right: Side, left_name: str, right_name: str) -> tuple[Any, ...]:
        if not asked.strip():
            raise InputError(text("chat.no_question"))
        if not (left_name.strip() or right_name.strip()):
            raise InputError(f"model: empty; expected {KINDS}")
        wait_for_none(left, right, text)
        for side, name in ((left, left_name), (right, right_name)):
            begin(side, name.strip())
            if side.name:
                side.messages.append({"role": "user", "content": asked.strip()})
        return "", left.shown(), right.shown()

    def forget_last(left: Side, right: Side) -> tuple[Any, ...]:
        for side in (left, right):
            while side.messages and side.messages[-1]["role"] == "assistant":
                side.messages.pop()
                side.ids.pop()
        return left.shown(), right.shown()

    def answer(side: Side, *settings: Any) -> Iterator[Messages]:
        yield from stream(side, models, *settings)

    def end(left: Side, right: Side) -> None:
        for side in (left, right):
            if side.chat and side.chat.request:
                side.chat.request.cancel()

    def forget_side(side: Side) -> Messages:
        end(side, side)
        side.messages, side.ids = [], []
        return []

    def forget(left: Side, right: Side) -> tuple[Any, ...]:
        return forget_side(left), forget_side(right)

    both = [sides[side] for side in SIDES]
    shown = [boxes[side] for side in SIDES]
    asked = gr.on(
        [send.click, question.submit], told(take), [question, *both, *names.values()], [question, *shown], **QUIET
    )
    anew = again.click(told(forget_last), both, shown, **QUIET)
    for side in SIDES:
        settings = [sides[side], system, temperature, top_p, tokens]
        for before in (asked, anew):
            before.success(told(answer), settings, boxes[side], concurrency_limit=None, **QUIET)
        boxes[side].clear(told(forget_side), sides[side], boxes[side], **QUIET)
        boxes[side].like(told(liked(text)), sides[side], None, **QUIET)
        better[side].click(told(preferred(side, text)), both, None, **QUIET)
    stop.click(told(end), both, None, **QUIET)
    clear.click(told(forget), both, shown, **QUIET)


def begin(side: Side, name: str) -> None:
    """Start a new dialogue if another model is wanted."""
    if side.name != name:
        side.name, side.loaded, side.messages, side.ids = name, None, [], []


def stream(
    side: Side, models: Models, system: str, temperature: float, top_p: float, tokens: float
) -> Iterator[Messages]:
    """Answer the dialogue's last question, piece by piece, and remember the answer for feedback.

    A dialogue that is forgotten meanwhile gets no answer.
    """
    if not side.name or not side.messages or side.messages[-1]["role"] != "user" or side.answering:
        return
    messages, side.answering = side.messages, True
    try:
        side.loaded = models.get("model", side.name)
        chat = side.loaded.chat(system.strip(), int(tokens), temperature, top_p, None)
        before = [*chat.messages, *side.shown()]
        chat.messages = copy.copy(before)
        side.chat = chat
        said = ""
        for piece in chat.answer():
            said += piece
            if side.messages is not messages:
                break
            yield [*side.shown(), {"role": "assistant", "content": said}]
    except Exception:
        messages.pop()  # the question is asked again
        raise
    finally:
        side.answering, side.chat = False, None
    if side.messages is not messages:
        return
    side.ids.append(uuid.uuid4().hex)
    side.loaded.store.remember(side.ids[-1], before, [said])
    side.messages.append({"role": "assistant", "content": said})
    yield side.shown()


def wait_for_none(left: Side, right: Side, text: Texts) -> None:
    """Raise an InputError while an answer is on its way."""
    if left.answering or right.answering:
        raise InputError(text("chat.answering"))


def liked(text: Texts) -> Any:
    """The event of a thumb."""

    def keep(side: Side, thumb: gr.LikeData) -> None:
        at = sum(message["role"] == "assistant" for message in side.shown()[: int(str(thumb.index))])
        if side.loaded is None or at >= len(side.ids):
            raise InputError(text("chat.nothing_yet"))
        path = side.loaded.store.add(Feedback(id=side.ids[at], label=bool(thumb.liked)))
        gr.Info(text("kept", file=f"data/feedback/{path.name}"), duration=4)

    return keep


def preferred(winner: str, text: Texts) -> Any:
    """The event of "this one is better"."""

    def keep(left: Side, right: Side) -> None:
        wait_for_none(left, right, text)
        if not (left.loaded and right.loaded and left.ids and right.ids):
            raise InputError(text("chat.nothing_yet"))
        prompts = [side.shown()[:-1] for side in (left, right)]
        if prompts[0] != prompts[1]:
            raise InputError(text("chat.not_the_same"))
        store = FeedbackStore(FEEDBACK, f"{left.loaded.version} | {right.loaded.version}")
        name = uuid.uuid4().hex
        store.remember(name, prompts[0], [side.messages[-1]["content"] for side in (left, right)])
        best = SIDES.index(winner)
        path = store.add(Feedback(id=name, chosen=best, rejected=1 - best))
        gr.Info(text("kept", file=f"data/feedback/{path.name}"), duration=4)

    return keep
