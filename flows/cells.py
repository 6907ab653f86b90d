"""What a comparison is made of: variants of params.yaml, each with several seeds. Read, checked, named."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows import ROOT
from flows.recipes import read_file
from flows.workspace import parse_overrides, parse_value
from glm.config import Params, load_params
from glm.errors import InputError
from tasks import STEPS
from tasks.inputs import check_inputs
from tasks.lineage import flatten, stage_entry

ENDS = ("evaluate_sft", "evaluate")  # where a comparison may stop, the shorter way first
NAME = re.compile(r"[\w=+-][\w.=+-]*")  # of folders, git references and MLflow tags alike
NAMED_BY_VALUE = ("sft.method", "algorithm")  # "lora" says enough
SEPARATOR = re.compile(r",(?=[a-z_]+(?:\.[a-z_]+)*=)")  # between the settings of a --variant


class Comparison(BaseModel):
    """Which variants are compared, and with which seeds; what a recipe file and the flow's parameters hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field("compare", pattern=r"^[\w+-][\w.+-]*$", description="of its folder reports/compare/<name>")
    variants: dict[str, dict[str, Any]] = Field(min_length=1, description="name: {dotted name of params.yaml: value}")
    seeds: list[int] = Field([], description="one run of each variant for each of them; empty: the seed of params.yaml")
    overrides: dict[str, Any] = Field({}, description="what all variants have in common beside params.yaml")
    until: str | None = Field(None, description="the last step: evaluate_sft or evaluate; empty: as far as they differ")


@dataclass(frozen=True)
class Cell:
    """One variant with one seed. `overrides` are all that differs from params.yaml."""

    name: str
    variant: str
    seed: int
    overrides: dict[str, Any]
    params: Params


def read_recipe(path: str | Path) -> Comparison:
    """The comparison that a YAML file describes.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    return validated(read_file(path), str(path))


def validated(values: Any, where: str) -> Comparison:
    """Plain values as a comparison.

    Raises:
        InputError: a line for each fault.
    """
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        faults = (
            f"{where}: {'.'.join(map(str, fault['loc']))}: {fault['msg']} (found {fault['input']!r})"
            if fault["type"] != "extra_forbidden"
            else f"{where}: unknown key {fault['loc'][-1]}; known here: {', '.join(Comparison.model_fields)}"
            for fault in error.errors()
        )
        raise InputError("\n".join(faults)) from None


def parse_settings(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """`name=value,value` pairs, as `dvc exp run -S` takes them: the values of each name. Lists need their brackets.

    Raises:
        InputError: a pair has no '=', no value, or the same value twice.
    """
    settings: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name or not text.strip():
            raise InputError(f"-S {pair!r}: expected NAME=VALUE,VALUE, such as -S sft.learning_rate=1e-3,2e-3")
        if name in settings:
            raise InputError(f"-S {pair!r}: {name} is given twice")
        values = parse_value(name, f"[{text}]")
        settings[name] = [parse_value(name, value) if isinstance(value, str) and value else value for value in values]
        if len({repr(value) for value in settings[name]}) < len(values):
            raise InputError(f"-S {pair!r}: a value is named twice")
    return settings


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """`NAME:key=value,key=value` as a variant's name and its overrides.

    Raises:
        InputError: it does not have this form.
    """
    name, colon, settings = text.partition(":")
    if not colon or not name or "=" in name:
        raise InputError(f"--variant {text!r}: expected NAME:KEY=VALUE,KEY=VALUE, such as small:sft.lora_rank=4")
    return name, parse_overrides(SEPARATOR.split(settings)) if settings else {}


def product(settings: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination of the values, by the name of what differs. `{}` gives one variant, params.yaml as it is."""
    combinations = [
        dict(zip(settings, values, strict=True)) for values in itertools.product(*map(tuple, settings.values()))
    ]
    return {variant_name(combination): combination for combination in combinations}


def variant_name(settings: Mapping[str, Any]) -> str:
    """A short name of what differs: `p_tuning`, `learning_rate=0.001`, `lora+lora_rank=4`."""
    parts = [
        str(value) if name in NAMED_BY_VALUE else f"{name.rpartition('.')[2]}={value}"
        for name, value in settings.items()
    ]
    return re.sub(r"[^\w.=+-]+", "-", "+".join(parts)).strip("-.") or "params.yaml"


def plan(comparison: Comparison) -> tuple[list[Cell], list[str]]:
    """The cells in the order in which they run, seed by seed, and the steps that each goes through.

    A comparison that was stopped early so has some seeds of every variant.

    Raises:
        InputError: a name, a value, the data or the model of some cell is not right, two variants are the same, or a
            name makes no difference up to the last step.
    """
    names = [name for settings in comparison.variants.values() for name in settings]
    if "seed" in [*names, *comparison.overrides]:
        raise InputError("seed: give seeds by --seeds: they are the repetitions of every variant")
    with chdir(ROOT):
        seeds = comparison.seeds or [load_params(overrides=comparison.overrides).seed]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"seeds: {', '.join(map(str, seeds))}: one is named twice")
        cells = [
            make_cell(comparison, variant, settings, seed)
            for seed in seeds
            for variant, settings in comparison.variants.items()
        ]
        refuse_twins(cells[: len(comparison.variants)])
        steps = steps_until(comparison.until, names, {cell.params.algorithm for cell in cells})
        for params in {repr((cell.params.model, cell.params.data)): cell.params for cell in cells}.values():
            check_inputs(params, steps)
    return cells, steps


def make_cell(comparison: Comparison, variant: str, settings: Mapping[str, Any], seed: int) -> Cell:
    """One cell, its parameters checked. Raises an InputError that names the variant."""
    if not NAME.fullmatch(variant):
        raise InputError(f"variant {variant!r}: its name may have letters, digits and _ - + = . only")
    overrides = {**comparison.overrides, **settings, "seed": seed}
    try:
        params = load_params(overrides=overrides)
    except InputError as error:
        raise InputError("\n".join(f"variant {variant!r}: {line}" for line in str(error).splitlines())) from None
    return Cell(f"{comparison.name}-{variant}-seed{seed}", variant, seed, overrides, params)


def refuse_twins(cells: Sequence[Cell]) -> None:
    """Raise an InputError if two variants are the same by all parameters: one would be run for nothing."""
    for one, other in itertools.combinations(cells, 2):
        if one.params == other.params:
            raise InputError(f"variants {one.variant!r} and {other.variant!r} are the same: no parameter differs")


def steps_until(until: str | None, names: Sequence[str], algorithms: Iterable[str]) -> list[str]:
    """The pipeline's steps up to `until`, whose policy is one of the `algorithms`.

    Without it, up to evaluate_sft if all `names` that differ are used by then: reward model and policy are spared.

    Raises:
        InputError: no such end, or a name that no step up to it uses.
    """
    if until not in (None, *ENDS):
        raise InputError(f"until: {until!r}; a comparison ends with {' or '.join(ENDS)}")
    for end in [until] if until else ENDS:
        steps = list(STEPS[: STEPS.index(end) + 1])
        entries = [stage_entry(step, algorithm, ROOT / "dvc.yaml") for algorithm in algorithms for step in steps]
        used = {name for entry in entries for name in entry.params}
        idle = [name for name in names if not any(name == use or name.startswith(f"{use}.") for use in used)]
        if not idle:
            return steps
    raise InputError(f"{idle[0]}: no step up to {end} uses it, so it makes no difference")


def differences(every: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of parameters by name: the dotted names, seed apart, that are not the same in all, with each one's values."""
    flat = {name: flatten(dict(values)) for name, values in every.items()}
    names = dict.fromkeys(key for values in flat.values() for key in values if key != "seed")
    differ = [key for key in names if len({repr(values.get(key)) for values in flat.values()}) > 1]
    return {name: {key: values.get(key) for key in differ} for name, values in flat.items()}
