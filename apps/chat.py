"""A dialogue in the terminal, answers streamed as they are made; through a pipe, a question a line and its answer."""

import json
import queue
import sys
import time
import unicodedata
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import Data
from glm.errors import InputError
from glm.files import write_text

if TYPE_CHECKING:
    from apps.models import Resolved
    from glm.serving.engine import Engine
    from glm.serving.request import Event, Request

HELP = """\
/clear         forget the dialogue            /regenerate   answer the last question again
/system TEXT   set the system prompt          /save FILE    keep the dialogue (.json, else text)
/stop          end (also Ctrl-D)              Ctrl-C        stop the answer"""
WORDS = {"clear": "/clear", "stop": "/stop"}  # the reference's commands


@dataclass
class Chat:
    """A dialogue with one model."""

    engine: "Engine"
    data: Data
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    saved: set[Path] = field(default_factory=set)  # files that may be written again
    request: "Request | None" = None  # the last one

    def answer(self) -> Generator[str, None, None]:
        """Pieces of the answer to the dialogue, which gets it in the end. Closing the iterator stops the answer.

        Raises:
            InputError: the prompt cannot be encoded; the question is taken out of the dialogue, which can go on.
            RuntimeError: the model failed.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        try:
            self.request = self.ask(events.put)
            self.engine.submit(self.request)
        except BaseException:
            self.messages.pop()
            raise
        text = ""
        try:
            while True:
                event = events.get()
                text += event.text
                if event.finish_reason == "error":
                    raise RuntimeError(event.error)
                yield event.text
                if event.finish_reason:
                    break
        finally:
            self.request.cancel()
            self.messages.append({"role": "assistant", "content": text})

    def ask(self, deliver: "Callable[[Event], None]") -> "Request":
        """A request for an answer to the dialogue, not submitted yet.

        Raises:
            InputError: the prompt cannot be encoded.
        """
        from glm.data.encode import prompt_ids
        from glm.serving.answer import AnswerReader
        from glm.serving.request import Request
        from glm.serving.sampling import SamplingParams

        ids, _ = prompt_ids(self.engine.tokenizer, self.messages, self.data)
        params = SamplingParams(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        return Request(ids, params, AnswerReader(self.engine.tokenizer), deliver)

    def speed(self) -> str:
        """What the last answer took."""
        if self.request is None or self.request.first_token is None:
            return ""
        tokens, end = self.request.completion_tokens, self.request.finished or time.monotonic()
        seconds = end - self.request.submitted
        return f"{tokens} tokens, {seconds:.1f} s, {tokens / seconds:.0f} tokens/s"


def talk(
    model: "Resolved", system: str, max_new_tokens: int, temperature: float, top_p: float, seed: int | None = None
) -> None:
    """Read questions from standard input until `/stop` or its end.

    Old rounds are left out once a prompt would exceed the model's length less `max_new_tokens`.

    Raises:
        InputError: there is no such model or adapter.
    """
    from glm.serving.engine import Engine

    loaded, tokenizer = model.load()
    with Engine(loaded, tokenizer, max_batch=1) as engine:
        longest = engine.max_length - max_new_tokens
        if longest < 16:
            raise InputError(f"max_new_tokens: {max_new_tokens} leaves no room for a question in {engine.max_length}")
        prefix = system or model.data.source_prefix
        data = Data(max_source_length=longest, source_prefix=prefix)
        chat = Chat(engine, data, max_new_tokens, temperature, top_p, seed)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _terminal(chat, model)
        else:
            _pipe(chat)


def _pipe(chat: Chat) -> None:
    """A question a line, answered by a line (line breaks in it become blanks); the lines are one dialogue.

    What commands say goes to standard error.

    Raises:
        InputError: a question that cannot be encoded; no answers follow.
    """
    for number, line in enumerate(sys.stdin, start=1):
        question = WORDS.get(line.strip(), line.strip())
        if question.startswith("/"):
            outcome = command(chat, question)
            if outcome == "stop":
                return
            if outcome != "answer":
                print(outcome, file=sys.stderr)
                continue
        elif not question:
            continue
        else:
            chat.messages.append({"role": "user", "content": question})
        try:
            answer = "".join(chat.answer())
        except InputError as error:
            raise InputError(f"line {number}: {error}") from None
        print(" ".join(printable(answer).split("\n")), flush=True)


def _terminal(chat: Chat, model: "Resolved") -> None:
    import readline  # gives `input` its editing, with the width of Chinese characters, and its history

    readline.set_auto_history(True)
    print(f"{model.describe()}\n{HELP}")
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("   (/stop or Ctrl-D ends)")
            continue
        except UnicodeDecodeError:
            print("That was not UTF-8: set the terminal's encoding to UTF-8 (LANG=C.UTF-8, say).")
            continue
        question = WORDS.get(question, question)
        if question.startswith("/"):
            outcome = command(chat, question)
            if outcome == "stop":
                return
            if outcome != "answer":
                print(outcome)
                continue
        elif not question:
            continue
        else:
            chat.messages.append({"role": "user", "content": question})
        _show(chat)


def _show(chat: Chat) -> None:
    """Print the answer as it comes; Ctrl-C stops it."""
    pieces = chat.answer()
    try:
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print(f"\n\033[2m{chat.speed()}\033[0m")
    except KeyboardInterrupt:
        print("\n(stopped)")
    except (InputError, RuntimeError) as error:
        print(error)
    finally:
        pieces.close()


def printable(text: str) -> str:
    """Without control characters, by which a model could write anywhere on the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def command(chat: Chat, line: str) -> str:
    """Do what a line that begins with / asks; returns what to say, "stop", or "answer" where an answer is due."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/stop":
        return "stop"
    if name == "/clear":
        chat.messages.clear()
        return "Forgotten."
    if name == "/system":
        chat.data = chat.data.model_copy(update={"source_prefix": rest})
        return f"System prompt: {rest}" if rest else "No system prompt."
    if name == "/regenerate":
        if not any(message["role"] == "user" for message in chat.messages):
            return "There is no question yet."
        while chat.messages[-1]["role"] != "user":
            chat.messages.pop()
        return "answer"
    if name == "/save":
        return save(chat, rest)
    return HELP if name == "/help" else f"{name}: no such command\n{HELP}"


def save(chat: Chat, name: str) -> str:
    """Keep the dialogue in a file: `.json` as a row that training takes, else as text."""
    if not name:
        return "/save FILE"
    path = Path(name).expanduser()
    if path.is_file() and path not in chat.saved:
        return f"{name}: is there already; choose another name."
    system: list[dict[str, Any]] = []
    if chat.data.source_prefix:
        system = [{"role": "system", "content": chat.data.source_prefix}]
    messages = [*system, *chat.messages]
    if name.endswith(".json"):
        text = json.dumps([{"messages": messages}], ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
    try:
        write_text(path, text)
    except OSError as error:
        return f"{name}: {error.strerror}"
    chat.saved.add(path)
    return f"Kept in {name}."
