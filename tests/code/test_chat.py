"""Models by name, and the dialogue in the terminal and through a pipe."""

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from apps.chat import Chat, _pipe, command, printable
from apps.models import Resolved, resolve
from glm.config import Data
from glm.errors import InputError
from glm.models import load_model, load_tokenizer
from glm.models.adapters import save_lora, save_score
from glm.models.lineage import Lineage, write_lineage
from glm.serving.engine import Engine

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "chatglm2-e2e"
CHAT = [sys.executable, "-m", "apps.cli", "chat", str(TINY), "--temperature", "0"]
ENVIRONMENT = os.environ | {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(load_model(TINY), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    save_lora(model, folder, base=str(TINY))
    return folder


def test_a_folder_a_pointer_an_adapter_and_a_hub_id(tmp_path: Path, adapter: Path) -> None:
    assert resolve(str(TINY)) == Resolved(str(TINY), str(TINY))
    (tmp_path / "source.json").write_text(json.dumps({"path": "zai-org/chatglm2-6b", "revision": "abc"}))
    assert resolve(str(tmp_path)) == Resolved(str(tmp_path), "zai-org/chatglm2-6b", "abc")
    assert resolve("zai-org/chatglm3-6b@main").revision == "main"
    found = resolve(str(adapter))
    assert (found.base, found.adapters) == (str(TINY), (str(adapter),))
    assert resolve(str(TINY), [str(adapter)]).adapters == (str(adapter),)
    model, tokenizer = found.load()
    assert model.config.vocab_size >= len(tokenizer)


def test_names_of_nothing_are_refused_with_what_to_do(tmp_path: Path) -> None:
    cases = {
        "models/never-made": "no such folder",
        "./nowhere": "no such folder",
        str(tmp_path): "neither a model",
        f"{TINY}-": f"there are .*{TINY}",
        "params.yaml": "a file; expected a folder, a hub id",
        "models:rlhf-policy": "expected a folder, a hub id .*models:/NAME@ALIAS",
        "": "empty; expected a folder",
    }
    for name, said in cases.items():
        with pytest.raises(InputError, match=said):
            resolve(name)
    with pytest.raises(InputError, match="adapter"):
        resolve(str(TINY), ["nowhere"])


def test_an_adapter_is_put_on_what_it_was_trained_on(tmp_path: Path, adapter: Path) -> None:
    upper = tmp_path / "upper"
    shutil.copytree(adapter, upper)
    write_lineage(upper, upper, "lora", Lineage(str(TINY), adapters=(str(adapter),)))
    assert resolve(str(TINY), [str(adapter), str(upper)]).adapters == (str(adapter), str(upper))
    with pytest.raises(InputError, match=rf"was trained on {TINY.name} \+ {adapter.name}, not on {TINY}; as a model"):
        resolve(str(TINY), [str(upper)])


def test_a_reward_model_does_not_chat(tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "lora")
    save_score(tmp_path / "lora", torch.nn.Linear(64, 1, bias=False))
    (tmp_path / "other").mkdir()
    save_score(tmp_path / "other", torch.nn.Linear(64, 1, bias=False))
    for folder in ("lora", "other"):
        with pytest.raises(InputError, match=r"model: .*a reward model"):
            resolve(str(tmp_path / folder))
        with pytest.raises(InputError, match=r"adapter: .*a reward model"):
            resolve(str(TINY), [str(tmp_path / folder)])


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(load_model(TINY), load_tokenizer(TINY), max_batch=1) as engine:
        chat = Chat(engine, Data(), max_new_tokens=8, temperature=0, top_p=1)
        assert "no question" in command(chat, "/regenerate")
        chat.messages.append({"role": "user", "content": "你好"})
        first = "".join(chat.answer())
        assert chat.messages[-1] == {"role": "assistant", "content": first}
        assert chat.speed().startswith("8 tokens, ") and chat.speed().endswith(" tokens/s")
        assert command(chat, "/regenerate") == "answer" and chat.messages == [{"role": "user", "content": "你好"}]
        assert "".join(chat.answer()) == first
        command(chat, "/system 简短")
        for name in ("a.json", "a.txt"):
            assert command(chat, f"/save {tmp_path / name}").startswith("Kept")
        [row] = json.loads((tmp_path / "a.json").read_text())
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert "user: 你好" in (tmp_path / "a.txt").read_text()
        (tmp_path / "thesis.txt").write_text("years of work")
        assert "is there already" in command(chat, f"/save {tmp_path / 'thesis.txt'}")
        assert (tmp_path / "thesis.txt").read_text() == "years of work"
        assert command(chat, f"/save {tmp_path / 'a.txt'}").startswith("Kept")  # its own may grow
        before = list(chat.messages)
        chat.messages.append({"role": "user", "content": "\udcff"})  # what a terminal of another encoding sends
        with pytest.raises(InputError, match="surrogate"):
            next(chat.answer())
        assert chat.messages == before
        monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n\udcff\n"))
        with pytest.raises(InputError, match=r"line 2: .* surrogate"):
            _pipe(chat)
        assert chat.messages == before
        assert "/save FILE" in command(chat, "/save") and "File exists" in command(chat, "/save /dev/null/x")
        assert command(chat, "/clear") == "Forgotten." and chat.messages == []
        assert "no such command" in command(chat, "/nonsense") and command(chat, "/stop") == "stop"
        chat.messages = [{"role": "user", "content": "你好"}]
        chat.max_new_tokens = 400
        stopped = chat.answer()
        next(stopped)
        stopped.close()
        assert chat.messages[-1]["role"] == "assistant" and chat.request.cancelled
    assert printable("a\x1b[2J\n你") == "a[2J\n你"


def test_a_pipe_gets_a_line_for_each_question() -> None:
    process = subprocess.run(
        [*CHAT, "--max-new-tokens", "6"], input="你好\n\nclear\n你好\n/regenerate\nstop\nx\n",
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    first, second, again = process.stdout.splitlines()
    assert first == second == again and process.stderr == "Forgotten.\n"


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [*CHAT, "--max-new-tokens", "400", "--temperature", "5", "--top-p", "1"], ENVIRONMENT)

    def read(until: str, seconds: float = 60) -> str:
        seen, deadline = b"", time.monotonic() + seconds
        while until.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    seen += os.read(terminal, 65536)
                except OSError:  # the program has ended
                    raise AssertionError(seen.decode(errors="replace")) from None
        return seen.decode(errors="replace")  # the last piece may end within a character

    assert "/regenerate" in read("\n> ")
    os.write(terminal, "你好世界\x7f\x7f，写\n".encode())  # two Chinese characters taken back
    read("写")
    time.sleep(0.5)
    os.write(terminal, b"\x03")
    answer = read("\n> ")
    assert "(stopped)" in answer or "tokens/s" in answer  # a fast machine may have been done
    os.write(terminal, b"/save /dev/null/x\n")
    read("\n> ")
    os.write(terminal, b"/stop\n")
    assert os.waitpid(pid, 0)[1] == 0


def test_names_of_the_registry_and_of_runs(tmp_path: Path, monkeypatch, adapter: Path) -> None:
    import mlflow

    from tasks.logged_models import log_chat_model
    from tasks.tracking import open_store

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client, experiment = open_store("rlhf-pipeline")
    with mlflow.start_run(experiment_id=experiment) as run:
        logged = log_chat_model("export", Data(source_prefix="简短"), TINY, adapter)
    with mlflow.start_run(experiment_id=experiment, tags={"glmflow.run.export": run.info.run_id}) as pipeline:
        pass
    version = mlflow.register_model(f"models:/{logged.model_id}", "policy").version
    client.set_registered_model_alias("policy", "champion", version)
    names = {
        "models:/policy@champion": "policy/1",
        "models:/policy/1": "policy/1",
        f"runs:/{run.info.run_id}/export": f"runs:/{run.info.run_id}/export",
        run.info.run_id: logged.model_id,
        pipeline.info.run_id: logged.model_id,
    }
    for name, said in names.items():
        found = resolve(name)
        assert (found.data.source_prefix, found.version, len(found.adapters)) == ("简短", said, 1)
        assert (Path(found.base) / "config.json").exists() and (
            Path(found.adapters[0]) / "adapter_config.json"
        ).exists()
    assert found.load()[0].config.model_type == "glm"
    cases = {
        "models:/policy@champoin": "versions 1 and aliases .*champion",
        "models:/policy/2": "versions 1 and",
        "models:/polcy/1": "models there are: policy",
        "models:/policy": "expected models:/NAME@ALIAS",
        f"runs:/{'f' * 32}/export": "not in the MLflow store",
    }
    for name, said in cases.items():
        with pytest.raises(InputError, match=said):
            resolve(name)
    with pytest.raises(InputError, match="no such run"):
        resolve("f" * 32)
