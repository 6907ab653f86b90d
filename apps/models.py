"""Any model by one name, with what comes with it: chat, server and export all ask here.

models/export, zai-org/chatglm2-6b        a folder, or a hub id (also NAME@REVISION)
models/sft                                a trained adapter's folder: its base is found
models:/rlhf-policy@champion, .../3       a registered model, by alias or version
runs:/ID/export, or a run's id alone      a model that a run logged; of a pipeline's run, its export's
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from glm.config import HUB_ID, Algorithm, Data
from glm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUN_ID = re.compile(r"[0-9a-f]{32}")
KINDS = "a folder, a hub id (owner/name), models:/NAME@ALIAS, models:/NAME/VERSION, or the id of an MLflow run"
STEPS = ("export", *get_args(Algorithm), "sft")  # of a pipeline's run, the first that logged a model


@dataclass(frozen=True)
class Resolved:
    """What a name stands for."""

    name: str
    base: str  # a folder or hub id
    revision: str | None = None
    adapters: tuple[str, ...] = ()  # on it, in this order
    quantization: str = "none"  # of the base, as the adapters were trained on it
    double_quantization: bool = True
    data: Data = field(default_factory=Data)  # system prompt and longest prompt, as in training where that is known
    version: str = ""  # what exactly it is: a registered version, a logged model, or a hub revision

    def load(
        self, device: str | None = None, dtype: str | None = None
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model in evaluation mode, on the GPU where there is one, and its tokenizer with its chat template."""
        import torch
        from transformers.utils import logging

        from glm.models import load_model, load_tokenizer

        logging.disable_progress_bar()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # The tokenizer first: it loads at once, and a model without one is of no use.
        tokenizer = load_tokenizer(self.base, revision=self.revision)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about what peft calls in transformers
            model = load_model(
                self.base,
                adapters=self.adapters,
                dtype=dtype,
                device=device,
                quantization=self.quantization,
                double_quantization=self.double_quantization,
                revision=self.revision,
            )
        return model, tokenizer

    def describe(self) -> str:
        """One line for people."""
        on = f" (revision {self.revision})" if self.revision else ""
        bits = "" if self.quantization == "none" else f" in {self.quantization}"
        parts = [f"{self.base}{on}{bits}", *self.adapters]
        said = " + ".join(parts)
        return said if self.name == said else f"{self.name}: {said}"


def resolve(name: str, adapters: Sequence[str] = ()) -> Resolved:
    """Find out what `name` stands for; `adapters` are put on it.

    Raises:
        InputError: there is nothing of this name, or what it stands on is missing.
    """
    if not name:
        raise InputError(f"model: empty; expected {KINDS}")
    if name.startswith("models:/"):
        found = _registered(name)
    elif name.startswith("runs:/"):
        found = _logged(name, name, name)
    elif RUN_ID.fullmatch(name) and not Path(name).exists():
        found = _of_run(name)
    else:
        found = _local_or_hub(name)
    for adapter in adapters:
        _check_adapter(adapter, found)
        found = replace(found, name=f"{found.name} + {adapter}", adapters=(*found.adapters, adapter))
    return found


def _local_or_hub(name: str) -> Resolved:
    from glm.models.checkpoint import follow_pointer
    from glm.models.lineage import FILE_NAME, read_lineage

    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"model: {name}: a file; expected {KINDS}")
        hub_id, _, commit = name.partition("@")
        if name.startswith(("models/", "exports/")) or not HUB_ID.fullmatch(hub_id):
            raise InputError(f"model: {name}: no such folder{_beside(name)}; expected {KINDS}")
        return Resolved(name, hub_id, commit or None, version=commit)
    if (folder / "MLmodel").exists():
        return _pyfunc(name, folder, "")
    _refuse_reward_model("model", folder)
    if (folder / FILE_NAME).exists():
        _, below = read_lineage(folder)
        if below is None:  # method full: a whole model
            return Resolved(name, name)
        adapters = (*below.adapters, name)
        return Resolved(name, below.base, below.revision, adapters, below.quantization, below.double_quantization)
    if (folder / "adapter_config.json").exists():  # of PEFT, from elsewhere
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if not base:
            raise InputError(f"model: {folder}/adapter_config.json names no base; give the base and --adapter {name}")
        found = resolve(base)
        return replace(
            found, name=name, revision=found.revision or config.get("revision"), adapters=(*found.adapters, name)
        )
    base, revision = follow_pointer(folder)
    if base == str(folder) and not (folder / "config.json").exists():
        raise InputError(f"model: {name}: holds neither a model (config.json) nor an adapter (adapter_config.json)")
    return Resolved(name, base, revision)


def _check_adapter(adapter: str, below: Resolved) -> None:
    """Refuse an adapter that was trained on other adapters than those of `below`: together they answer nonsense."""
    from glm.models.lineage import FILE_NAME

    folder = Path(adapter)
    if not folder.exists():
        raise InputError(f"adapter: {adapter}: no such folder{_beside(adapter)}")
    _refuse_reward_model("adapter", folder)
    if not (folder / FILE_NAME).exists():
        return
    record = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    if record["base"] is None:
        raise InputError(f"adapter: {adapter}: a whole model; name it as the model")
    if len(record["adapters"]) != len(below.adapters):
        stood_on = [Path(entry["path"]).name for entry in (record["base"], *record["adapters"])]
        raise InputError(
            f"adapter: {adapter}: was trained on {' + '.join(stood_on)}, not on {below.describe()}; as a model of its "
            "own it brings what it stands on"
        )


def _refuse_reward_model(field: str, folder: Path) -> None:
    from glm.models.adapters import SCORE_NAME

    path = folder / "adapter_config.json"
    task = json.loads(path.read_text(encoding="utf-8")).get("task_type") if path.exists() else None
    if task == "SEQ_CLS" or (folder / SCORE_NAME).exists():
        raise InputError(f"{field}: {folder}: a reward model, which scores answers and gives none")


def _beside(name: str) -> str:
    """What there is, for who has mistyped the last part of a path."""
    parent = Path(name).parent
    there = sorted(f"{path}" for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    if not there or parent == Path():
        return "; `glmflow run` makes it" if name.startswith("models/") else ""
    return f"; there are {', '.join(there[:10])}"


def _of_run(run_id: str) -> Resolved:
    """The model that an MLflow run logged; of a pipeline's run, the one of its last step that did."""
    from mlflow.exceptions import MlflowException

    client = _client()
    try:
        run = client.get_run(run_id)
        makers = [run.data.tags.get(f"glmflow.run.{step}") for step in STEPS]
        for maker in [run_id, *filter(None, makers)]:
            if outputs := client.get_run(maker).outputs.model_outputs:
                return _logged(run_id, f"models:/{outputs[-1].model_id}", outputs[-1].model_id)
    except MlflowException as error:
        raise InputError(f"model: {run_id}: no such run in the MLflow store ({error.message})") from None
    raise InputError(f"model: run {run_id} has logged no model; see `make ui`")


def _registered(uri: str) -> Resolved:
    """The version of models:/NAME@ALIAS or models:/NAME/VERSION; an error says which there are."""
    from tasks.registered import find_version

    try:
        version = find_version(_client(), uri)
    except InputError as error:
        raise InputError(f"model: {error}") from None
    return _logged(uri, uri, f"{version.name}/{version.version}")


def _logged(name: str, uri: str, version: str) -> Resolved:
    import mlflow
    from mlflow.exceptions import MlflowException

    _client()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model: {name}: not in the MLflow store {mlflow.get_tracking_uri()}: {reason}") from None
    return _pyfunc(name, folder, version)


def _pyfunc(name: str, folder: Path, version: str) -> Resolved:
    """A chat model as tasks/logged_models.py logs it: folders as artifacts, the prompt's settings as config."""
    from glm.models.checkpoint import follow_pointer
    from tasks.logged_models import logged_folders

    folders, config = logged_folders(folder)
    if not folders or "generation" not in config:
        raise InputError(f"model: {name}: not a chat model that this project logged")
    base, revision = follow_pointer(folders[0])
    return Resolved(
        name,
        base,
        revision,
        tuple(folders[1:]),
        config["quantization"],
        config.get("double_quantization", True),  # not in models that were logged before
        Data(**config["data"]),
        version,
    )


def _client() -> Any:
    from glm.config import Tracking
    from tasks.tracking import open_store

    return open_store(Tracking().experiment)[0]
