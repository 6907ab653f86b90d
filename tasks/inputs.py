"""Are the things that params.yaml names there? Asked before a run starts, so that it does not fail after an hour."""

import re
from pathlib import Path

from glm.config import EMBEDDED, Params
from glm.data.registry import find, local_files, read_registry
from glm.errors import InputError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_inputs(params: Params) -> None:
    """Look for every dataset's registry entry and local files, and for the model's folder. Nothing is downloaded.

    Raises:
        InputError: names the first thing that is missing, and what would be right.
    """
    data = params.data
    registry = read_registry(data.dataset_dir)
    for name in (*data.text, *data.sft, *data.reward, *data.ppo):
        entry = find(registry, name, data.dataset_dir)
        if not entry.hf_hub_url:
            local_files(name, entry, data.dataset_dir)
    path = params.model.path
    if path == EMBEDDED:
        if not data.text:
            raise InputError("data.text: empty, but model.path is 'embedded', whose base model learns from plain text")
    elif Path(path).is_dir():
        if not Path(path, "config.json").is_file():
            raise InputError(f"model.path: {path} has no config.json, so it is no model folder")
    elif not HUB_ID.fullmatch(path):
        raise InputError(f"model.path: {path!r} is neither 'embedded', nor a folder, nor a hub id such as owner/name")
