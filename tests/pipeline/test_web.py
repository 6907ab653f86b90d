"""The web page in a real browser: a project of trivial stages, a tiny model that answers, a real store and Prefect."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from flows.server import free_port
from glm.data.raw_rows import read_rows
from glm.data.registry import read_registry
from tests.pipeline.conftest import Project, last_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium at /usr/bin")
MODEL = "tests/golden/chatglm2-e2e"
SECONDS = 120_000  # milliseconds that anything may take on a busy machine


@contextmanager
def serving(project: Project, *words: str, **env: str) -> Iterator[str]:
    """The page of a project; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "apps.cli", "web", "--port", str(port), *words]
    log = (project.root.parent / "web.log").open("w")
    process = subprocess.Popen(command, cwd=project.root, env=project.env | env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_up(url), 300)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


@pytest.fixture
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


def open_page(browser, url: str, language: str = "en", **options: object):
    """A visitor's page; requests to other sites, and errors of scripts, are kept in `page.faults`."""
    page = browser.new_page(viewport={"width": 1440, "height": 1000}, **options)
    page.set_default_timeout(SECONDS)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: None if is_ours(request.url, url) else page.faults.append(request.url))
    page.goto(f"{url}/{language}/")
    playwright.expect(page.locator("#preview pre.command")).to_be_visible(timeout=SECONDS)
    return page


def is_ours(address: str, url: str) -> bool:
    return address.startswith((url, "data:", "blob:"))


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).first.click()


def fill(page, selector: str, text: str) -> None:
    box = page.locator(f"{selector} textarea, {selector} input").first
    box.fill(text)
    box.blur()


def sees(page, selector: str, text: str) -> None:
    playwright.expect(page.locator(selector)).to_contain_text(text, timeout=SECONDS)


def is_told(page, text: str) -> None:
    """A line in a corner of the page."""
    toast = page.locator(".toast-body").filter(has_text=text).first
    playwright.expect(toast).to_be_visible(timeout=SECONDS)
    assert "Traceback" not in toast.inner_text()


def feedback(project: Project, name: str) -> list[dict]:
    path = project.root / "data" / "feedback" / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:  # not splitlines(), for which U+2028 in an answer ends a line too
        return [json.loads(line) for line in lines]


def as_shown(text: str) -> str:
    """The text as a browser's text field gives it back: it has one kind of line break (HTML, textarea's API value)."""
    return re.sub(r"\r\n?", "\n", text)


@pytest.mark.slow
def test_train(project: Project, prefect_api: str, browser) -> None:
    """A fault in place, a run that outlives the page and is found again, stopped cleanly, and resumed to its end."""
    with serving(project, SLEEP_sft="600") as url:
        page, other = open_page(browser, url), open_page(browser, url, "zh")
        tab(page, "SFT")
        fill(page, "#p-sft-lora_rank", "0")
        sees(page, "#p-sft-lora_rank", "greater than or equal to 1")
        sees(page, "#preview .faults", "sft.lora_rank")
        fill(page, "#p-sft-lora_rank", "12")
        sees(page, "#preview pre.command", "glmflow run -S sft.lora_rank=12")
        sees(page, "#preview .changes", "sft.lora_rank")
        tab(page, "Model")
        fill(page, "#p-model-path", "../../etc")
        sees(page, "#p-model-path", "'..' leads out of the project")
        page.locator("#start").click()
        time.sleep(1)
        assert not (project.root / ".prefect" / "runs").exists()
        fill(page, "#p-model-path", "embedded")
        sees(page, "#preview pre.command", "glmflow run -S sft.lora_rank=12")
        page.locator("#start").click()
        project.wait_for("sft", seconds=300)
        sees(page, "#status .step.running", "sft")
        playwright.expect(page.locator("#status .step.running .bar")).to_be_visible(timeout=SECONDS)
        sees(page, "#log", "this is preprocess")
        sees(other, "#status .step.running", "sft")
        playwright.expect(other.locator("#start")).to_be_disabled(timeout=SECONDS)
        page.reload()
        sees(page, "#status .step.running", "sft")
        assert not page.faults and not other.faults
    page.close(), other.close()
    assert project.executed()[-1] == "sft" and project.processes()  # the page is gone, the run is not

    with serving(project, SLEEP_sft="0") as url:
        page = open_page(browser, url, "zh")
        sees(page, "#status .state", "运行中")
        page.locator("#stop").click()
        sees(page, "#status .state", "已停止")
        assert [one for one in project.processes() if "web" not in one.cmdline()] == []
        assert last_run(prefect_api)["state"]["type"] in ("FAILED", "CRASHED", "CANCELLED")
        page.locator("#resume").click()
        sees(page, "#status .state", "已完成")
        assert "fetch" not in project.executed()
        assert last_run(prefect_api)["state"]["name"] == "Completed"
        assert project.git("status", "--porcelain") == ""


REGISTER = """
from tasks.tracking import open_store
client, _ = open_store("rlhf-pipeline")
client.create_registered_model("rlhf-policy")
for _ in range(2):
    client.create_model_version("rlhf-policy", "models/export")
"""


def test_chat_rank_and_promote(project: Project, browser) -> None:
    """A real model answers twice side by side; thumbs, preferences and rankings become rows that training reads."""
    project.command(sys.executable, "-c", REGISTER)
    with serving(project) as url:
        page = open_page(browser, url)
        tab(page, "Chat")
        fill(page, "#model-left", MODEL)
        fill(page, "#model-right", f"./{MODEL}")
        page.locator("#question textarea").fill("写一条酒店评论")
        page.locator("#send").click()
        for side in ("left", "right"):
            playwright.expect(page.locator(f"#chat-{side} .bot.message")).to_have_count(1, timeout=SECONDS)
        for side in ("left", "right"):
            settled(page, f"#chat-{side} .bot.message")
        page.locator("#chat-left").get_by_label("Like", exact=True).first.click()
        is_told(page, "data/feedback/labels.jsonl")
        page.locator("#better-right").click()
        is_told(page, "data/feedback/pairs.jsonl")
        [label], [pair] = feedback(project, "labels.jsonl"), feedback(project, "pairs.jsonl")
        assert label["label"] is True and label["prompt"] == [{"role": "user", "content": "写一条酒店评论"}]
        assert pair["rejected"] == label["completion"] and pair["chosen"] != pair["rejected"]

        fill(page, "#model-left", "../elsewhere")
        page.locator("#question textarea").fill("在吗")
        page.locator("#send").click()
        is_told(page, "'..' leads out of the project")
        fill(page, "#model-left", "/etc")
        page.locator("#question textarea").fill("在吗")
        page.locator("#send").click()
        is_told(page, "outside of the project")

        tab(page, "Rank")
        fill(page, "#rank-model", "~/x")
        fill(page, "#rank-prompt", "写一条电脑评论")
        page.locator("#rank-generate").click()
        is_told(page, "expected a folder of the project")
        fill(page, "#rank-model", MODEL)
        # At 1.0 one set of answers in 1,400 has an empty one, which is not shown; here one in 5 million.
        fill(page, "#rank-temperature", "0.3")
        page.locator("#rank-generate").click()
        playwright.expect(page.locator("#rank-3")).to_be_visible(timeout=SECONDS)
        boxes = [page.locator(f"#rank-{place} textarea") for place in range(4)]
        wait_for(lambda: all(box.input_value() for box in boxes))
        answers = [box.input_value() for box in boxes]
        page.locator("#rank-up-1").click()
        wait_for(lambda: page.locator("#rank-0 textarea").input_value() == answers[1])
        page.locator("#rank-keep").click()
        is_told(page, "data/feedback/rankings.jsonl")
        [ranking] = feedback(project, "rankings.jsonl")
        kept = [as_shown(answer) for answer in ranking["completion"]]
        assert kept == [answers[1], answers[0], *answers[2:]]

        tab(page, "Models")
        sees(page, "#versions", "rlhf-policy")
        page.locator("#promote").click()
        is_told(page, "reason")
        fill(page, "#reason", "reads well")
        page.locator("#promote").click()
        sees(page, "#models-said", "version 2 is the champion")
        choose(page, "#version", "1")
        page.locator("#promote").click()
        sees(page, "#models-said", "version 1 is the champion (before: 2)")
        fill(page, "#reason", "rude answers")
        page.locator("#rollback").click()
        sees(page, "#models-said", "version 2 is the champion again")
        sees(page, "#moves", "rude answers")
        fill(page, "#lineage-of", "data/../../secret")
        page.locator("#lineage").click()
        is_told(page, "'..' leads out of the project")
        assert not page.faults
    entry = read_registry(project.root / "data", ["feedback"])["feedback"]
    fetched = project.root / "fetched"  # as the step fetch leaves them
    fetched.mkdir()
    for file in (project.root / "data" / "feedback").glob("*.jsonl"):
        shutil.copy(file, fetched)
    for use, count in (("reward", 2), ("kto", 1)):
        read = [one for one in read_rows("feedback", entry, fetched, use) if one.row]
        assert len(read) == count


def settled(page, selector: str) -> str:
    """What stands there once it has not changed for a second."""
    before = ""
    while (now := page.locator(selector).inner_text()) != before or not now:
        before = now
        time.sleep(1)
    return now


def choose(page, selector: str, option: str) -> None:
    page.locator(f"{selector} input").click()
    page.get_by_role("option", name=option, exact=True).click()


@pytest.mark.slow
def test_data_and_runs(project: Project, browser) -> None:
    """Rows are paged through in the shape of a use; runs in MLflow stand side by side."""
    project.flow("--until", "evaluate_sft")
    with serving(project) as url:
        page = open_page(browser, url)
        tab(page, "Data")
        sees(page, "#datasets", "alpaca_gpt4_zh")
        sees(page, "#rows", "reviews_sft:reviews_sft:1")
        page.locator("#rows-forth").click()
        sees(page, "#rows", "reviews_sft:reviews_sft:6")
        choose(page, "#dataset", "alpaca_gpt4_zh")
        is_told(page, "is not on this machine")
        tab(page, "Runs")
        sees(page, "#runs", "FINISHED")
        sees(page, "#runs-differ", "loss")
        assert not page.faults


def test_beyond_this_machine_a_password_is_needed(project: Project, browser) -> None:
    refused = project.command(sys.executable, "-m", "apps.cli", "web", "--host", "0.0.0.0", check=False)
    assert refused.returncode == 2 and "--password" in refused.stderr and "Traceback" not in refused.stderr
    login = {"GLMFLOW_WEB_USER": "ann", "GLMFLOW_WEB_PASSWORD": "a secret: yes"}
    with serving(project, "--host", "0.0.0.0", **login) as url:
        for path in ("/", "/en/", "/en/config", "/en/gradio_api/queue/data", "/en/gradio_api/file=params.yaml"):
            assert httpx.get(f"{url}{path}").status_code == 401
            assert httpx.get(f"{url}{path}", auth=("ann", "a guess")).status_code == 401
        credentials = {"username": "ann", "password": "a secret: yes"}
        page = open_page(browser, url, http_credentials=credentials)
        assert not page.faults


def test_files_and_other_sites_stay_out(project: Project) -> None:
    with serving(project) as url:
        for path in (
            "/en/gradio_api/file=params.yaml", "/en/gradio_api/file=/etc/passwd", "/en/gradio_api/info",
            "/en/gradio_api/proxy=http://127.0.0.1/", "/en/static/../../../../etc/passwd", "/en/monitoring",
            "/en/static/%2e%2e/%2e%2e/__init__.py", "/en/assets/..%2f..%2fkey.pem",
        ):  # fmt: skip
            assert httpx.get(f"{url}{path}").status_code == 404, path
        upload = httpx.post(f"{url}/en/gradio_api/upload", files={"files": ("../../x.txt", b"x")})
        assert upload.status_code == 404
        assert httpx.get(f"{url}/en/", headers={"origin": "http://evil.example"}).status_code == 403
        assert httpx.get(f"{url}/en/", headers={"host": "evil.example"}).status_code == 403
        assert httpx.get(url, headers={"accept-language": "zh-CN"}).headers["location"] == "/zh/"
