"""What is measured on text before a tokenizer sees it: whether two texts say the same, their language, their length."""

import re
import unicodedata

LANGUAGES = ("zh", "ja", "ko", "en", "ru", "ar", "other", "none")

# Blanks and the punctuation of sentences. Signs that carry meaning in formulas and code (+ - * / = < > ( ) [ ] { } % #)
# stay, and so does a point, comma or blank between two digits: 1.5 is not 15.
_MARKS = r"""\s,.!?;:'"“”‘’«»、。…·~—–《》「」『』【】〈〉"""
_LOOSE = re.compile(rf"(?<![{_MARKS}])(?:(?<!\d)[{_MARKS}]++|[{_MARKS}]++(?!\d))")
_SCRIPTS = {
    "han": re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]"),
    "kana": re.compile(r"[\u3040-\u30ff]"),
    "hangul": re.compile(r"[\uac00-\ud7af\u1100-\u11ff]"),
    "latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "arabic": re.compile(r"[\u0600-\u06ff]"),
}
_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")


def normalise(text: str) -> str:
    """What is left of a text when width, case, blanks and sentence punctuation do not count (NFKC, casefold).

    A text of nothing but punctuation stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _LOOSE.sub("", folded) or text


def language(text: str) -> str:
    """The language by the script of most of its words, as one of LANGUAGES; Latin script counts as "en".

    A Han character weighs as much as half a Latin word (six letters). Kana make Japanese of Han, wherever they are more
    than a tenth of it.
    """
    count = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    if count["kana"] * 10 > count["han"]:
        weights = {"ja": 3 * (count["kana"] + count["han"])}
    else:
        weights = {"zh": 3 * count["han"]}
    weights |= {
        "ko": 3 * count["hangul"],
        "en": count["latin"],
        "ru": count["cyrillic"],
        "ar": count["arabic"],
    }
    best = max(weights, key=lambda name: weights[name])
    if weights[best]:
        return best
    return "other" if any(character.isalpha() for character in text) else "none"


def estimate_tokens(text: str) -> int:
    """Tokens that a Chinese-English vocabulary of 65k needs, give or take a third: 0.65 a CJK character, 0.27 another.

    Used where no tokenizer exists yet (the embedded one is made from the rows).
    """
    wide = len(_WIDE.findall(text))
    return round(0.65 * wide + 0.27 * (len(text) - wide)) + 1
