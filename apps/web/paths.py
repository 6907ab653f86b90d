"""No field of the page reaches a file outside of the project."""

import re
from pathlib import Path
from typing import Any

from flows import ROOT
from glm.errors import InputError

ADDRESS = re.compile(r"(https?://|models:/|runs:/)")


def check_path(field: str, text: str) -> str:
    """`text` without blanks around it, if it names nothing on this machine outside of the project: a hub id may stay.

    Raises:
        InputError: an absolute path outside, a home, `..`, or a link that leads outside.
    """
    text = text.strip()
    if any(ord(char) < 32 for char in text):
        raise InputError(f"{field}: control characters are in no file's name")
    if ".." in re.split(r"[/\\:]", text):
        raise InputError(f"{field}: {text!r}: '..' leads out of the project; name a file or folder inside of it")
    if ADDRESS.match(text):
        return text
    if re.match(r"\w+:/", text) or text.startswith("~"):
        raise InputError(f"{field}: {text!r}: expected a folder of the project, a hub id, models:/… or a run's id")
    if not Path(ROOT, text).resolve().is_relative_to(ROOT):
        raise InputError(f"{field}: {text!r} is outside of the project {ROOT}")
    return text


def check_paths(field: str, value: Any) -> None:
    """`check_path` for every text of a parameter's value, whatever lists or mappings it stands in."""
    if isinstance(value, str):
        for part in value.split(","):
            check_path(field, part)
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_paths(field, key)
            check_paths(field, inner)
    elif isinstance(value, list):
        for inner in value:
            check_paths(field, inner)
