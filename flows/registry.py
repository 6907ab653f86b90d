"""Registration of the exported model in MLflow: plain functions that the flow calls.

Not a DVC stage: registering acts on the store, would happen in every experiment, and would not happen again after the
store is lost. It is idempotent by the export's DVC hash instead.
"""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from flows import guard
from flows.errors import SmokeTestError
from flows.interrupt import interruptible
from glm.config import Params
from glm.errors import InputError
from tasks.inputs import known_hash
from tasks.lineage import git_tags
from tasks.logged_models import EXAMPLE, artifact_folders, log_chat_model
from tasks.tracking import open_store, source_tags, store_lock, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER = "challenger"  # the alias of the newest result
SMOKE_TEST_SECONDS = 600

_SMOKE_TEST = """
import sys
import mlflow
answer = mlflow.pyfunc.load_model(sys.argv[1]).predict({example}, params={{"max_new_tokens": 16}})[0]
assert answer["role"] == "assistant" and isinstance(answer["content"], str), f"no answer: {{answer}}"
"""


def register(export_dir: str | Path, run_id: str | None, params: Params) -> str:
    """Register the exported model and let the alias `challenger` point to it. Returns the version's number.

    The same export (by DVC hash) is registered once; a second call only sees to the alias, which moves when the model
    has loaded and answered in a process of its own.

    Args:
        export_dir: what the export step made: a whole model with its tokenizer, or an adapter.
        run_id: the run that made it (runs/export.json), whose logged model is registered; without one, or if the
            store does not know it, the folder is logged now.

    Raises:
        InputError: there is no such folder.
        SmokeTestError: the model does not answer; the alias is as before.
    """
    if not Path(export_dir).is_dir():
        raise InputError(f"{export_dir}: no such folder; the export step makes it")
    client, experiment_id = open_store(params.tracking.experiment)
    name = params.promote.model_name
    digest = known_hash(Path(export_dir))
    with store_lock(store_uri()):  # two flows may end at once
        version = find_version(client, name, digest)
        if version is None:
            model_id = find_logged_model(client, run_id, digest)
            if model_id is None:
                model_id = _log_model(experiment_id, export_dir, digest, params)
            version = _create_version(client, name, model_id, run_id, digest)
    tested = "smoke_test" in client.get_model_version(name, version).tags
    if not (tested and alias_version(client, name, CHALLENGER) == version):
        smoke_test(f"models:/{name}/{version}")  # first: a kill in the middle must not leave the alias on it
        client.set_model_version_tag(name, version, "smoke_test", "passed")
        client.set_registered_model_alias(name, CHALLENGER, version)
    return version


def find_version(client: "MlflowClient", name: str, digest: str) -> str | None:
    """The version that holds the export with this DVC hash."""
    found = client.search_model_versions(f"name = '{name}' AND tags.dvc_md5 = '{digest}'")
    return str(found[0].version) if found else None


def find_logged_model(client: "MlflowClient", run_id: str | None, digest: str) -> str | None:
    """The id of the model with this DVC hash that a run logged."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        outputs = client.get_run(run_id).outputs.model_outputs
    except MlflowException:  # DVC restored the export, and the store that knew its run is gone
        return None
    models = [client.get_logged_model(output.model_id) for output in outputs]
    return next((model.model_id for model in models if model.tags.get("dvc_md5") == digest), None)


def alias_version(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version an alias points to."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


@contextmanager
def moved_alias(client: "MlflowClient", name: str, alias: str, version: str) -> Iterator[None]:
    """A transaction: the alias points to `version`, and back to where it was if the block fails."""
    before = alias_version(client, name, alias)
    client.set_registered_model_alias(name, alias, version)
    try:
        yield
    except BaseException:
        if before is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, before)
        raise


def smoke_test(model_uri: str) -> None:
    """Load a model from the store and ask it a question, in a process that sees nothing of this checkout.

    An empty answer is one: whether answers are good is for the gate to say, not for this.

    Raises:
        SmokeTestError: with the last line of what the process said.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["MLFLOW_TRACKING_URI"] = store_uri()
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-c", _SMOKE_TEST.format(example=EXAMPLE), model_uri]
        with guard.running(command, cwd=Path(elsewhere), env=environment, time_limit=SMOKE_TEST_SECONDS) as process:
            output = interruptible(process.communicate)[0]
    if process.returncode == guard.TIMED_OUT:
        raise SmokeTestError(f"{model_uri}: no answer within {SMOKE_TEST_SECONDS} s")
    if process.returncode:
        raise SmokeTestError(f"{model_uri}: {(output.strip().splitlines() or ['no output'])[-1]}")


def _log_model(experiment_id: str, export_dir: str | Path, digest: str, params: Params) -> str:
    import mlflow

    tags = source_tags("flows.registry") | git_tags() | {"glmflow.step": "register", "dvc.in.models/export": digest}
    folders, quantised = artifact_folders(export_dir)
    with mlflow.start_run(experiment_id=experiment_id, run_name="register", tags=tags):
        return log_chat_model("export", params.data, *folders, **quantised, tags={"dvc_md5": digest}).model_id


def _create_version(client: "MlflowClient", name: str, model_id: str, run_id: str | None, digest: str) -> str:
    import mlflow

    tags = {"dvc_md5": digest} | ({"glmflow.run.export": run_id} if run_id else {})
    with redirect_stderr(io.StringIO()):  # it says there what it does, in the midst of the flow's progress
        version = mlflow.register_model(f"models:/{model_id}", name, tags=tags)
    return str(version.version)
