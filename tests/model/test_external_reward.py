"""Rewards from outside: a real function, a tiny real BERT, a real local server that is silent, broken or busy."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from glm.config import RewardModel
from glm.errors import InputError
from glm.training import external_reward
from glm.training.batch import batch_of
from glm.training.external_reward import Scorer, load
from tests.model.test_ppo import PARAMS, TOKENIZER, make_actors, prompts, train


class Endpoint(BaseHTTPRequestHandler):
    """Rewards are the answers' lengths; the path says what goes wrong first."""

    requests: ClassVar[list[tuple[str, int]]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, len(asked["answers"])))
        first = sum(path == self.path for path, _ in self.requests) == 1
        status = {"/busy": 503 if first else 200, "/broken": 500, "/refuses": 400}.get(self.path, 200)
        rewards: object = [float(len(answer)) for answer in asked["answers"]]
        body = {"/short": {"rewards": [1.0]}, "/odd": {"scores": rewards}, "/nan": {"rewards": [float("nan")] * 2}}
        self.send_response(status)
        self.end_headers()
        try:
            text = b"<html>" if self.path == "/page" else json.dumps(body.get(self.path, {"rewards": rewards})).encode()
            self.wfile.write(text)
        except BrokenPipeError:
            pass  # the client has given up

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch) -> Iterator[str]:
    waits: list[float] = []
    monkeypatch.setattr(external_reward.time, "sleep", lambda seconds: waits.append(seconds))
    Endpoint.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def http(url: str, **options: object) -> RewardModel:
    return RewardModel(source="http", path=url, **options)


def test_an_endpoint_is_asked_in_batches(address: str) -> None:
    score = load(http(f"{address}/good", batch_size=2))
    assert score(["问"] * 5, ["一", "二二", "", "四四四四", "五"]) == [1, 2, 0, 4, 1]
    assert [count for _, count in Endpoint.requests] == [2, 2, 1]


def test_a_busy_endpoint_is_asked_again(address: str) -> None:
    assert load(http(f"{address}/busy"))(["q"], ["abc"]) == [3.0]
    assert len(Endpoint.requests) == 2


@pytest.mark.parametrize(
    ("path", "requests", "words"),
    [
        ("broken", 3, r"no rewards after 3 requests: status 500"),
        ("refuses", 1, r"no rewards after 1 requests: status 400"),
        ("short", 1, r"1 rewards for 2 answers"),
        ("odd", 1, r'expected \{"rewards": \[\.\.\.\]\}, found b\'\{"scores"'),
        ("page", 1, r"found b'<html>'"),
        ("nan", 1, r"reward 0 of 2 is nan"),
    ],
)
def test_what_an_endpoint_gets_wrong_is_said(address: str, path: str, requests: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(http(f"{address}/{path}", max_retries=2))(["q", "q"], ["a", "b"])
    assert len(Endpoint.requests) == requests


def test_a_silent_endpoint_and_a_dead_one(address: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(InputError, match=r"no rewards after 2 requests: .*timed out"):
            load(http(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=0.3, max_retries=1))(["q"], ["a"])
        assert 0.5 < time.monotonic() - started < 10
        port = silent.getsockname()[1]
    with pytest.raises(InputError, match=r"no rewards after 1 requests: .*refused"):
        load(http(f"http://127.0.0.1:{port}/", max_retries=0))(["q"], ["a"])


def test_a_python_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompts, answers):\n    return [len(p) + len(a) for p, a in zip(prompts, answers)]\n"
        "def none(prompts, answers):\n    return None\n"
        "def words(prompts, answers):\n    return '1'\n"
        "def fails(prompts, answers):\n    return [1 / 0]\n"
    )

    def function(path: str) -> RewardModel:
        return RewardModel(source="function", path=path)

    assert load(function(f"{file}:length"))(["ab"], ["cde"]) == [5.0]
    assert load(function("operator:eq")) is not None
    with pytest.raises(InputError, match="expected 1 numbers, found None"):
        load(function(f"{file}:none"))(["ab"], ["cde"])
    with pytest.raises(InputError, match="expected 1 numbers, found '1'"):
        load(function(f"{file}:words"))(["ab"], ["cde"])
    with pytest.raises(ZeroDivisionError) as raised:  # its own traceback says most, and where it came from is added
        load(function(f"{file}:fails"))(["ab"], ["cde"])
    assert raised.value.__notes__ == [f"reward_model.path {file}:fails raised this, asked for 1 rewards"]
    with pytest.raises(InputError, match=r"has no function 'height'; it has length, none, words, fails"):
        load(function(f"{file}:height"))
    broken = tmp_path / "broken.py"
    broken.write_text("def length(prompts, answers)\n")
    with pytest.raises(InputError, match=r"broken\.py cannot be run: SyntaxError"):
        load(function(f"{broken}:length"))
    with pytest.raises(InputError, match="no file"):
        load(function(f"{tmp_path / 'no.py'}:length"))
    with pytest.raises(InputError, match="cannot be imported"):
        load(function("no_such_module:length"))


def tiny_bert(folder: Path, num_labels: int) -> Path:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"好坏房间很脏净干"]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=13, max_position_embeddings=16, num_labels=num_labels, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_classifier_of_another_family(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for labels in (1, 2):
        folder = tiny_bert(tmp_path / str(labels), labels)
        score = load(RewardModel(source="classifier", path=str(folder), batch_size=2))
        asked, answers = ["好", "房间", "好"], ["很好", "很脏" * 20, "坏"]
        found = score(asked, answers)
        model, tokenizer = (
            kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
        )
        logits = model(**tokenizer("好", "坏", return_tensors="pt")).logits[0]
        wanted = logits[0] if labels == 1 else logits[1] - logits[0]
        assert found[2] == pytest.approx(wanted.item(), abs=1e-5)
        assert len(set(found)) == 3
    with pytest.raises(InputError, match="3 labels"):
        load(RewardModel(source="classifier", path=str(tiny_bert(tmp_path / "3", 3))))
    with pytest.raises(InputError, match=r"^reward_model\.path: [^:]*/none: no such folder$"):
        load(RewardModel(source="classifier", path=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no sequence classifier") as refused:
        load(RewardModel(source="classifier", path=str(tmp_path / "empty")))
    assert len(str(refused.value).splitlines()) == 1
    pretrained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1").bert
    pretrained.save_pretrained(tmp_path / "1")
    with pytest.raises(InputError, match=r"no trained classifier: its files have no classifier\.bias"):
        load(RewardModel(source="classifier", path=str(tmp_path / "1")))


def test_a_classifier_that_was_a_causal_lm(tmp_path: Path) -> None:
    """It has no padding token, is asked by its chat template, and is read where the answer ends."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<end>", "?", "user", "assistant", *"好坏房间很脏净干"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="?")), eos_token="<end>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[一-龥]"), "isolated")]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(words), num_labels=1, **shape)).eval()
    model.save_pretrained(tmp_path)
    found = load(RewardModel(source="classifier", path=str(tmp_path)))(["好", "房间"], ["很脏很脏", "坏"])
    asked = tokenizer(["user 好 assistant 很脏很脏 ", "user 房间 assistant 坏 "]).input_ids
    assert max(map(len, asked)) == 7 and 1 not in asked[0]
    wanted = [model(torch.tensor([ids])).logits.item() for ids in asked]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_ppo_learns_from_a_function(tmp_path: Path) -> None:
    """Short answers are better; prompts come as the texts that are given for them."""
    seen: set[str] = set()

    def brevity(asked: list[str], answers: list[str]) -> list[float]:
        seen.update(asked)
        return [-float(len(answer)) for answer in answers]

    actors = make_actors(tmp_path)
    texts = {tuple(prompt): f"text of {len(prompt)}" for prompt in [*prompts(40), *prompts(24)]}
    actors.scorer = Scorer(brevity, TOKENIZER, texts)
    batch = batch_of(prompts(4), [[5, 6, 7], [8], [9, 10], [11]], actors.model.device)
    assert (batch.prompts, batch.answers) == (prompts(4), [[5, 6, 7], [8], [9, 10], [11]])
    numbers, _ = train(actors, PARAMS.model_copy(update={"max_steps": 20, "eval_steps": 20, "score_norm": True}))
    assert numbers["reward"] > numbers["reward_before"] + 0.3 * numbers["reward_std_before"]
    assert all(text.startswith("text of ") for text in seen)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": "http"}, "needs a path"),
        ({"path": "x"}, "has no path"),
        ({"source": "http", "path": "localhost:80"}, "begins with http"),
        ({"source": "function", "path": "mine.py"}, "module:name or file.py:name"),
    ],
)
def test_contradictions_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardModel(**values)
