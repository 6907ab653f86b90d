"""Appended to flows/registry.py where trivial stages run: their export is no model that could be logged and asked."""

import os

from flows.errors import SmokeTestError


def smoke_test(model_uri: str) -> None:
    if os.environ.get("FAIL_SMOKE_TEST") == model_uri.rpartition("/")[2]:
        raise SmokeTestError(f"{model_uri}: no answer")


def _log_model(experiment_id: str, export_dir: str, digest: str, params: object) -> str:
    return digest


def _create_version(client, name: str, model_id: str, run_id: str | None, digest: str) -> str:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    # not this folder: a server takes no path of its client's
    return str(client.create_model_version(name, f"s3://nowhere/{digest}", tags={"dvc_md5": digest}).version)
