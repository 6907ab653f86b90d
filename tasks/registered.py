"""Registered model versions by their URI."""

import re
from typing import TYPE_CHECKING

from glm.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL_URI = re.compile(r"models:/(?P<name>[\w.-]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")


def find_version(client: "MlflowClient", uri: str) -> "ModelVersion":
    """The version that models:/NAME@ALIAS or models:/NAME/VERSION names.

    Raises:
        InputError: it is no such URI, or nothing is registered there; the message says what is.
    """
    from mlflow.exceptions import MlflowException

    parts = MODEL_URI.fullmatch(uri)
    if parts is None:
        raise InputError(f"{uri!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts["name"], parts["alias"], parts["version"]
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException:
        raise InputError(f"{uri}: not registered; {_registered(client, name)}") from None


def _registered(client: "MlflowClient", name: str) -> str:
    versions = sorted((int(found.version) for found in client.search_model_versions(f"name = '{name}'")), reverse=True)
    if not versions:
        names = [model.name for model in client.search_registered_models()]
        return f"models there are: {', '.join(names)}" if names else "no model is registered yet"
    aliases = client.get_registered_model(name).aliases
    said = ", ".join(f"{alias} ({version})" for alias, version in aliases.items())
    return f"{name} has versions {', '.join(map(str, versions[:10]))} and aliases {said or 'none'}"


def version_of_run(client: "MlflowClient", name: str, run_id: str) -> "ModelVersion":
    """The newest version of model `name` that a run made: a pipeline's run, or that of its export step.

    Raises:
        InputError: no such run, or it made no version; the message says what helps.
    """
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_run(run_id).data.tags
    except MlflowException:
        raise InputError(f"run {run_id}: not in the store; `make ui` lists the runs") from None
    for key, value in {
        "glmflow.run.pipeline": run_id,
        "glmflow.run.export": tags.get("glmflow.run.export", run_id),
    }.items():
        found = client.search_model_versions(f"name = '{name}' AND tags.`{key}` = '{value}'")
        if found:
            return max(found, key=lambda version: int(version.version))
    raise InputError(f"run {run_id} ({tags.get('glmflow.step', 'no step')}): no version of {name} was made by it")


def version_of_hash(client: "MlflowClient", digest: str) -> "ModelVersion | None":
    """The newest version whose export has this DVC hash, under any name."""
    found = client.search_model_versions(f"tags.dvc_md5 = '{digest}'")
    return max(found, key=lambda version: int(version.version), default=None)
