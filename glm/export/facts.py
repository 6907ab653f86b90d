"""What is known of how a model was made, as its card tells it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Everything is plain values, and whatever is unknown is empty.

    sources     {dataset: {"entry": its line of dataset_info.json, "sha256": {file: digest}}}
    rows        {use: {dataset: {"kept", "train", "dev", "test": numbers}}}, use being sft, reward, ppo ...
    base        {"path", "revision", "files": {file: {"sha256"}}} of the base model
    metrics     {"WHO.NAME": number}, WHO being base, sft or the algorithm
    parameters  {dotted name of params.yaml: value}
    origin      {"what": "value"} of lines that say where all this is recorded: run, version, commit
    """

    algorithm: str = ""
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
