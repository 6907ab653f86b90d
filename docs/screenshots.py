"""Take the README's pictures of the web page: python docs/screenshots.py http://127.0.0.1:7860

Wants a page whose project has a finished run, Chromium at /usr/bin, and a font for Chinese. Changes nothing in the
project. Names after the address choose pictures; web-train shows the run that was started last, at work if it is.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
PATIENCE = 300_000  # milliseconds
QUESTION = "写一条酒店评论，以“房间”开头。"


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).first.click()


def fill(page: Any, selector: str, text: str) -> None:
    box = page.locator(f"{selector} textarea, {selector} input").first
    box.fill(text)
    box.blur()


def train(page: Any) -> None:
    """A parameter that differs, and the run that was started last."""
    tab(page, "SFT")
    fill(page, "#p-sft-learning_rate", "5e-4")
    page.locator("#preview .changes").wait_for()
    page.locator("#status .state").wait_for()


def train_zh(page: Any) -> None:
    tab(page, "监督微调")
    fill(page, "#p-sft-num_train_epochs", "0")
    page.locator("#preview .faults").wait_for()


def runs(page: Any) -> None:
    tab(page, "Runs")
    page.locator("#runs-drawn img").wait_for()


def chat(page: Any) -> None:
    """The same question to SFT and to the policy."""
    tab(page, "Chat")
    fill(page, "#model-left", "models/sft")
    fill(page, "#model-right", "models/ppo")
    page.locator("#question textarea").fill(QUESTION)
    page.locator("#send").click()
    for side in ("left", "right"):
        page.locator(f"#chat-{side} .bot.message").first.wait_for()
    page.wait_for_timeout(15_000)


def rank(page: Any) -> None:
    tab(page, "Rank")
    fill(page, "#rank-model", "models/sft")
    fill(page, "#rank-prompt", QUESTION)
    page.locator("#rank-generate").click()
    page.locator("#rank-3").wait_for()


def models(page: Any) -> None:
    tab(page, "Models")
    page.locator("#versions table").wait_for()
    page.locator("#lineage").click()
    page.locator("#lineage-drawn img").wait_for()


SHOTS: dict[str, tuple[str, Callable[[Any], None]]] = {  # file: language, and what to do first
    "web-train": ("en", train),
    "web-train-zh": ("zh", train_zh),
    "web-runs": ("en", runs),
    "web-chat": ("en", chat),
    "web-rank": ("en", rank),
    "web-models": ("en", models),
}


def save(picture: bytes, path: Path) -> None:
    """Write a PNG of 64 colours, a third of the size."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main(url: str, names: list[str]) -> None:
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path="/usr/bin/chromium")
        for name in names or SHOTS:
            language, act = SHOTS[name]
            page = browser.new_page(viewport={"width": 1360, "height": 860})
            page.set_default_timeout(PATIENCE)
            page.goto(f"{url}/{language}/")
            page.locator("#preview pre.command").wait_for()
            act(page)
            page.evaluate("window.scrollTo(0, 0)")
            page.wait_for_timeout(1500)
            save(page.screenshot(), HERE / f"{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2:])
