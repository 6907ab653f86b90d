"""The command line: light to start, exit statuses, and what the doctor finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps import doctor

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "mlflow", "prefect", "dvc", "fastapi", "pandas"}


def glmflow(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "apps.cli", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("command", [[], ["run"], ["compare"], ["data", "check"]])
def test_help_imports_nothing_heavy_and_names_every_command(command: list[str]) -> None:
    program = (
        "import sys, json\nfrom apps.cli import app\n"
        f"try: app({[*command, '--help']})\nexcept SystemExit: print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *shown, loaded = done.stdout.splitlines()
    assert not HEAVY & set(json.loads(loaded))
    if command:
        assert f"usage: glmflow {' '.join(command)}" in shown[0]
        return
    for name in ("run", "chat", "serve", "doctor", "params", "data"):
        assert any(f" {name} " in line for line in shown)
    assert any("--install-completion" in line for line in shown)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("c", {"chat", "compare", "champions"}),
        ("serve --engine ", {"own", "vllm"}),
        ("export models/sft out --quantization cpm", {"cpm-int4", "cpm-int8"}),
        ("run -S a=1 --un", {"--until"}),
        ("run --until evaluate", {"evaluate", "evaluate_sft"}),
        ("run rec", set()),  # the shell's own files
        ("compare --me", {"--methods"}),
        ("data check --use re", {"reward"}),
        ("data check alpaca_gpt4_", {"alpaca_gpt4_en", "alpaca_gpt4_zh"}),
    ],
)
def test_what_the_tab_key_offers(typed: str, offered: set[str]) -> None:
    words = f"glmflow {typed}"
    asked = {"_GLMFLOW_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    program = "import sys; sys.argv = ['glmflow']; from apps.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "models/none-of-that-name"], "glmflow run"),
        (["serve", "models/none-of-that-name", "--host", "0.0.0.0"], "--api-key"),
        (["run", "-S", "ppo.learning_rat=1"], "learning_rate"),
        (["chat", "--temperature", "-1"], "--temperature"),
    ],
)
def test_wrong_input_has_exit_status_2_and_one_message(arguments: list[str], said: str) -> None:
    done = glmflow(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_doctor_says_what_is_wrong_and_what_to_do(tmp_path: Path, monkeypatch) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# a comment\npydantic==0.0.1\nno-such-package-here==1.0\n")
    missing, other = doctor.packages(lock)
    assert (missing.state, "no-such-package-here" in missing.what) == ("fault", True)
    assert (other.state, "locked 0.0.1" in other.what) == ("warning", True)
    [no_lock] = doctor.packages(tmp_path / "none")
    assert no_lock.state == "fault"

    monkeypatch.chdir(tmp_path)
    assert doctor.parameters().state == "fault"
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text((ROOT / "data" / "dataset_info.json").read_text())
    assert doctor.parameters().state == "ok"
    (tmp_path / "data" / "mine.jsonl").write_text("{}\n")
    for name in ("mine.jsonl", "absent.jsonl"):
        (tmp_path / "data" / f"{name}.dvc").write_text(f"outs:\n- md5: {'0' * 32}\n  path: {name}\n")
    registered, absent, changed = doctor.tracked_data()
    assert registered.state == "ok"
    assert (absent.state, "absent.jsonl" in absent.what, "dvc pull" in absent.advice) == ("fault", True, True)
    assert (changed.state, "mine.jsonl" in changed.what) == ("warning", True)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert doctor.tracking_store().state == doctor.prefect_server().state == "fault"
    assert "MLFLOW_TRACKING_URI" in doctor.tracking_store().advice


def test_the_doctors_exit_status() -> None:
    done = glmflow("doctor", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1 and "does not answer" in done.stdout and "1 to be mended" in done.stdout
