"""The cells of a comparison that DVC's own commands have made: `dvc exp run`, queued or not. Nothing is run here."""

import json
from typing import Any

from ruamel.yaml import YAML

from flows import ROOT
from flows.cells import differences, steps_until, variant_name
from flows.comparison_report import Outcome, measure
from flows.workspace import git
from glm.config import Params, validate_params
from glm.errors import InputError

PARTS = 5  # of the name of an experiment's reference: refs/exps/<2 digits>/<38 digits>/<name>


def read_experiments(wanted: str, until: str | None) -> tuple[list[Outcome], Params, str, list[str]]:
    """The named experiments (by comma), or "all" that start from the last commit.

    Returns:
        The outcome of each; the parameters of the first; the step at which they are compared; the names that differ.

    Raises:
        InputError: there is no such experiment, or none at all.
    """
    from tasks.comparison_run import runs_of_experiments

    commits = find_experiments(wanted)
    yaml = YAML(typ="safe", pure=True)
    files = {name: yaml.load(git("show", f"{commit}:params.yaml")) for name, commit in commits.items()}
    params = {name: validate_params(values, f"params.yaml of {name}") for name, values in files.items()}
    varied = differences({name: values.model_dump() for name, values in params.items()})
    names = list(next(iter(varied.values())))
    end = steps_until(until, names, {values.algorithm for values in params.values()})[-1]
    first = next(iter(params.values()))
    runs = runs_of_experiments(first, list(commits))
    outcomes = []
    for name, commit in commits.items():
        cell = (name, variant_name(varied[name]) if names else "params.yaml", params[name].seed, runs.get(name))
        try:
            outcomes.append(Outcome(*cell, *read_cell(commit, end, params[name].algorithm)))
        except FileNotFoundError as error:
            outcomes.append(Outcome(*cell, error=str(error)))
    return outcomes, first, end, names


def find_experiments(wanted: str) -> dict[str, str]:
    """The commit of each experiment by its name."""
    head = git("rev-parse", "HEAD").strip()
    every = git("for-each-ref", "refs/exps", "--format=%(refname) %(objectname)")
    listed = [line.split() for line in every.splitlines()]
    refs = {ref: commit for ref, commit in listed if len(ref.split("/")) == PARTS}
    here = {ref.split("/")[-1]: commit for ref, commit in refs.items() if "".join(ref.split("/")[2:4]) == head}
    if wanted == "all":
        if not here:
            raise InputError("there is no DVC experiment on the last commit: `dvc exp run` makes one")
        return here
    known = {ref.split("/")[-1]: commit for ref, commit in refs.items()} | here
    names = wanted.split(",")
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"no DVC experiment {missing[0]!r}; there are: {', '.join(sorted(known)) or 'none'}")
    return {name: known[name] for name in names}


def read_cell(commit: str, end: str, algorithm: str) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What an experiment measured, from DVC's cache.

    Raises:
        FileNotFoundError: it did not get as far as `end`.
    """
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(str(ROOT), rev=commit)

    def read(path: str) -> dict[str, Any]:
        return json.loads(files.read_text(path, encoding="utf-8")) if files.exists(path) else {}

    if not files.exists(f"metrics/{end}.json"):
        raise FileNotFoundError(f"it has no metrics/{end}.json")
    return measure(read, end, algorithm)
