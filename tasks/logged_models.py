"""Logging models and adapters in MLflow so that they answer wherever the artifact is loaded.

Pyfuncs from code (apps/mlflow_*.py) with the folders as artifacts and the package `glm` beside them. The flavour
mlflow.transformers is not used: with a LoRA on a local base it writes the base again, under the adapter's key names,
and loads it back with freshly initialised weights.

All folders are copied into the store, so that a logged model outlives the workspace. A base folder holds a model, or a
source.json that points to one; that one is not copied.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import glm
from glm.config import Data

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.models.model import ModelInfo

APPS = Path(__file__).parent.parent / "apps"
PACKAGES = (
    *("mlflow", "torch", "transformers", "peft", "accelerate"),
    *("sentencepiece", "safetensors", "pydantic", "ruamel.yaml"),
)

QUESTION = {"role": "user", "content": "写一条酒店评论，以“房间”开头。"}
ANSWER = {"role": "assistant", "content": "房间很干净，服务也很好。"}
EXAMPLE = {"messages": [QUESTION]}
GENERATION = {"max_new_tokens": 128, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "seed": 0}


def log_chat_model(
    name: str,
    data: Data,
    base: str | Path,
    *adapters: str | Path,
    quantization: str = "none",
    double_quantization: bool = True,
    tags: dict[str, str] | None = None,
) -> "ModelInfo":
    """Log `base`, with or without adapter folders on it, to the active MLflow run: messages in, the answer out.

    `data` gives what a prompt must have in common with training: the system prompt and the longest prompt.
    """
    from mlflow.models import infer_signature

    signature = infer_signature([EXAMPLE], [ANSWER], params=GENERATION)
    config = {
        "generation": GENERATION,
        "quantization": quantization,
        "double_quantization": double_quantization,
        "data": data.model_dump(include={"source_prefix", "max_source_length"}),
    }
    return _log(name, "mlflow_model.py", _folders(base, adapters), config, signature, EXAMPLE, tags)


def log_reward_model(
    name: str,
    data: Data,
    base: str | Path,
    *adapters: str | Path,
    quantization: str = "none",
    double_quantization: bool = True,
) -> "ModelInfo":
    """Log a reward model to the active MLflow run: messages and answer in, score out.

    The last folder, `base` itself where there are no adapters, holds its head.
    """
    from mlflow.models import infer_signature

    example = {"messages": [QUESTION, ANSWER]}
    config = {
        "quantization": quantization,
        "double_quantization": double_quantization,
        "data": data.model_dump(include={"source_prefix", "max_source_length", "max_target_length"}),
    }
    signature = infer_signature([example], [0.5])
    return _log(name, "mlflow_reward_model.py", _folders(base, adapters), config, signature, example)


def artifact_folders(folder: str | Path) -> tuple[list[str], dict[str, Any]]:
    """(base and adapters in their order, how the base is quantised) of the artifact in `folder`, itself included.

    The second are arguments of `log_chat_model` and `log_reward_model`. A folder that stands on nothing, such as the
    export of a whole model, is all by itself.
    """
    from glm.models.lineage import FILE_NAME, read_lineage

    below = read_lineage(folder)[1] if Path(folder, FILE_NAME).exists() else None
    if below is None:
        return [str(folder)], {}
    quantised = {"quantization": below.quantization, "double_quantization": below.double_quantization}
    return [below.base, *below.adapters, str(folder)], quantised


def logged_folders(folder: str | Path) -> tuple[list[str], dict[str, Any]]:
    """(base and adapters in their order, config) of a model that was logged here, in the folder that it lies in."""
    from ruamel.yaml import YAML

    flavors = YAML(typ="safe").load(Path(folder, "MLmodel")).get("flavors", {})
    flavor: dict[str, Any] = flavors.get("python_function", {})
    artifacts = flavor.get("artifacts") or {}
    names = sorted(artifacts, key=lambda name: (name != "base", name))
    return [str(Path(folder, artifacts[name]["path"])) for name in names], flavor.get("config") or {}


def _folders(base: str | Path, adapters: tuple[str | Path, ...]) -> dict[str, str]:
    return {"base": str(base)} | {f"adapter_{number:02}": str(folder) for number, folder in enumerate(adapters, 1)}


def _log(
    name: str,
    code: str,
    folders: dict[str, str],
    config: dict[str, Any],
    signature: "ModelSignature",
    example: dict[str, Any],
    tags: dict[str, str] | None = None,
) -> "ModelInfo":
    import mlflow

    return mlflow.pyfunc.log_model(
        name=name,
        python_model=str(APPS / code),
        artifacts=folders,
        model_config=config,
        code_paths=[str(Path(glm.__file__).parent)],
        signature=signature,
        input_example=example,
        pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in PACKAGES],
        tags=tags,
    )


def folder_size(folder: str | Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
