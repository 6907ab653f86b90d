"""The parameters of params.yaml as fields of a form, from the schema: kind, choices, description, bounds, faults.

A field's text is read as `-S NAME=VALUE` of the command line reads it, so that form and command say the same.
"""

import copy
import json
import re
import shlex
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from apps.web.paths import check_paths
from flows import ROOT
from flows.workspace import parse_value
from glm.config import Params, load_params, validate_params
from glm.errors import InputError

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # of pydantic's bounds
FILE = ROOT / "params.yaml"
PROSE = {"data.source_prefix"}  # names no file, and may be empty
Filled = str | bool | None  # what a component of the form holds


@dataclass(frozen=True)
class Parameter:
    """One field. `choices` are texts; empty for what is typed, ("true", "false") for a check box."""

    name: str  # dotted
    choices: tuple[str, ...]
    is_text: bool  # a string as it is, not YAML
    is_list: bool  # names, which may be given with commas between them
    description: str
    bounds: str

    @property
    def is_box(self) -> bool:
        return self.choices == ("true", "false")

    @property
    def section(self) -> str:
        return self.name.partition(".")[0] if "." in self.name else ""


@cache
def parameters() -> tuple[Parameter, ...]:
    """All of them, in the schema's order."""
    return tuple(_walk(Params, ""))


def _walk(section: Any, prefix: str) -> Iterator[Parameter]:
    for key, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _walk(field.annotation, f"{prefix}{key}.")
        else:
            yield _parameter(f"{prefix}{key}", field)


def _parameter(name: str, field: FieldInfo) -> Parameter:
    kinds = list(_alternatives(field.annotation))
    choices: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            choices += map(str, get_args(kind))
        elif kind is bool:
            choices += ["true", "false"]
    is_closed = all(get_origin(kind) is Literal or kind in (bool, type(None)) for kind in kinds)
    if is_closed and type(None) in kinds:
        choices.append("")
    bounds = ", ".join(
        f"{SIGNS[sign]} {getattr(bound, sign)}" for bound in field.metadata for sign in SIGNS if hasattr(bound, sign)
    )
    is_text = all(kind in (str, type(None)) for kind in kinds)
    is_list = any(get_origin(kind) is list for kind in kinds)
    return Parameter(name, tuple(choices) if is_closed else (), is_text, is_list, field.description or "", bounds)


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one)
    else:
        yield annotation


def as_text(value: Any) -> str:
    """A parameter's value as the form shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def current() -> dict[str, str]:
    """The text of every field as params.yaml has it now."""
    values = _values(FILE.stat().st_mtime_ns)
    return {one.name: as_text(_dotted(values, one.name)) for one in parameters()}


@lru_cache(maxsize=1)
def _values(changed: int) -> dict[str, Any]:
    """params.yaml, whose last change was then: reading YAML takes longer than all the rest."""
    return load_params(FILE).model_dump()


def _dotted(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values


@dataclass(frozen=True)
class Form:
    """A filled form: what differs from params.yaml, and what is wrong with it by the name of the field."""

    before: dict[str, str]
    overrides: dict[str, Any]
    faults: dict[str, str]

    def words(self, until: str = "") -> list[str]:
        """The command line of `glmflow run` that does the same."""
        settings = [word for name, value in self.overrides.items() for word in ("-S", f"{name}={_yaml(name, value)}")]
        return [*settings, *(["--until", until] if until else [])]


def command(words: Sequence[str]) -> str:
    """What to type in a terminal."""
    return shlex.join(["glmflow", "run", *words])


def read_form(filled: Mapping[str, Filled]) -> Form:
    """What a form says; all its faults at once, as the schema and the rules for paths see them."""
    before = current()
    overrides: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for one in parameters():
        text = as_text(filled[one.name]).strip()
        if text == before[one.name]:
            continue
        try:
            value = _value(one, text)
            if value == _value(one, before[one.name]):
                continue  # 5e-5 and 0.00005
            if one.name not in PROSE:
                check_paths(one.name, value)
            overrides[one.name] = value
        except InputError as error:
            faults[one.name] = _message(str(error), one.name)
    values = copy.deepcopy(_values(FILE.stat().st_mtime_ns))
    for name, value in overrides.items():
        section, _, key = name.rpartition(".")
        (_dotted(values, section) if section else values)[key] = value
    try:
        validate_params(values, str(FILE))
    except InputError as error:
        for line in str(error).splitlines():
            where, _, message = line.removeprefix(f"{FILE}: ").partition(": ")
            faults.setdefault(_field_of(where, message, filled), message or where)
    return Form(before, overrides, faults)


def _value(one: Parameter, text: str) -> Any:
    if one.is_text:
        return text if text or one.name in PROSE else None
    if one.is_list and "," in text and text[0] not in "[{":
        return [part.strip() for part in text.split(",") if part.strip()]
    return [] if one.is_list and not text else parse_value(one.name, text)


def _message(text: str, name: str) -> str:
    return text.splitlines()[0].removeprefix(f"{name}: ")


def _field_of(where: str, message: str, filled: Mapping[str, Filled]) -> str:
    """The field that a fault is shown at: its own, or the first one that the message of a section's check names."""
    if where in filled:
        return where
    within = "" if where == "params" else f"{where}."
    named = [f"{within}{word}" for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", message)]
    owner = next((name for name in filled if where.startswith(f"{name}.")), "")  # an item of a list
    first = next((name for name in filled if name.startswith(within)), "seed")
    return owner or next((name for name in named if name in filled), first)


def _yaml(name: str, value: Any) -> str:
    """A value as -S takes it."""
    text = as_text(value)
    try:
        return text if parse_value(name, text) == value else json.dumps(value, ensure_ascii=False)
    except InputError:
        return json.dumps(value, ensure_ascii=False)
