"""Recipes: files of the shape of params.yaml that hold only what is theirs, and how far their run goes.

    # what it is, the command that runs it, numbers
    until: evaluate_sft          # the last step; without it the run goes on to export and registers its result
    model: {path: zai-org/chatglm2-6b, dtype: bfloat16}
    data: {sft: [alpaca_gpt4_zh], reward: [], ppo: []}

The rest is params.yaml's, so that there is one truth: a recipe is a set of overrides, and its run an experiment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from glm.config import Params, Section
from glm.errors import InputError
from tasks import steps_to


@dataclass(frozen=True)
class Recipe:
    """What a recipe changes of params.yaml, by dotted name, and its last step."""

    overrides: dict[str, Any]
    until: str | None = None


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe; its values are checked with all others when a run starts.

    Raises:
        InputError: no such file, not YAML, not a mapping, a recipe of `glmflow compare`, or `until` is no step.
    """
    values = read_file(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections of params.yaml, found {values!r}")
    if "variants" in values:
        raise InputError(f"{path}: compares variants: `glmflow compare {path}` runs it")
    until = values.pop("until", None)
    steps_to(until)
    return Recipe(dotted(values), until)


def read_file(path: str | Path) -> Any:
    """The plain values of a recipe's YAML file.

    Raises:
        InputError: no such file, or it is not YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; recipes/README.md lists the recipes") from None
    except (MarkedYAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from None


def dotted(values: Mapping[str, Any], section: type[Section] = Params, prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names. A mapping that is one parameter's value, such as weights of datasets, stays."""
    names: dict[str, Any] = {}
    for name, value in values.items():
        field = section.model_fields.get(name)
        kind = field.annotation if field else None
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            names |= dotted(value, kind, f"{prefix}{name}.")
        else:
            names[f"{prefix}{name}"] = value
    return names
