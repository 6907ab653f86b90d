"""The schema of params.yaml: every knob of a run, its type, its bounds, and what must not be combined.

Sections are in glm/sections; what holds between sections, and the reading of the file, is here.

Names follow transformers, peft and trl where they exist. `load_params` is the one way in: it refuses unknown keys
(naming the nearest valid one), wrong types, values out of bounds and contradictions before anything runs, all faults at
once. `python -m glm.config` writes the JSON schema for editors.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from glm.errors import InputError
from glm.sections.data import Data
from glm.sections.launch import Launch, Strategy
from glm.sections.model import EMBEDDED, HUB_ID, EmbeddedModel, Model, Quantization
from glm.sections.policy import (
    ONLINE,
    Algorithm,
    Dpo,
    Grouped,
    Grpo,
    Kto,
    Offline,
    Online,
    Ppo,
    Raft,
    RewardModel,
    Rival,
    Rloo,
    Rollout,
    Rrhf,
)
from glm.sections.result import Evaluate, Export, MetricGate, Promote, PromoteMetrics, Tracking
from glm.sections.section import Section
from glm.sections.training import Method, Reward, Sft, Training, Tuned

__all__ = [
    "EMBEDDED",
    "HUB_ID",
    "ONLINE",
    "Algorithm",
    "Data",
    "Dpo",
    "EmbeddedModel",
    "Evaluate",
    "Export",
    "Grouped",
    "Grpo",
    "Kto",
    "Launch",
    "Method",
    "MetricGate",
    "Model",
    "Offline",
    "Online",
    "Params",
    "Ppo",
    "Promote",
    "PromoteMetrics",
    "Quantization",
    "Raft",
    "Reward",
    "RewardModel",
    "Rival",
    "Rloo",
    "Rollout",
    "Rrhf",
    "Section",
    "Sft",
    "Strategy",
    "Tracking",
    "Training",
    "Tuned",
    "load_params",
    "validate_params",
]

LONGEST = 100  # characters of a wrong value that a message shows


class Params(Section):
    """All of params.yaml."""

    seed: int = Field(42, ge=0, le=2**32 - 1, description="of training and sampling; data and base keep their own")
    algorithm: Algorithm = Field("ppo", description="what the policy step improves the SFT model by")
    launch: Launch = Launch()
    model: Model = Model()
    data: Data = Data()
    sft: Sft = Sft()
    reward: Reward = Reward()
    reward_model: RewardModel = RewardModel()
    rollout: Rollout = Rollout()
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    kto: Kto = Kto()
    grpo: Grpo = Grpo()
    rloo: Rloo = Rloo()
    rrhf: Rrhf = Rrhf()
    raft: Raft = Raft()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    promote: Promote = Promote()
    tracking: Tracking = Tracking()

    @property
    def tuned(self) -> dict[str, Tuned]:
        """The sections by whose `method` something is trained; not those of algorithms that are not chosen."""
        sections = {name: getattr(self, name) for name in ("sft", "reward", self.algorithm)}
        return {name: section for name, section in sections.items() if isinstance(section, Tuned)}

    @model_validator(mode="after")
    def methods_can_be(self) -> Self:
        """Refuse what no code could train."""
        kind = self.model.quantization
        for stage, section in self.tuned.items():
            if kind != "none" and section.method in ("freeze", "full"):
                raise ValueError(
                    f"{stage}.method {section.method} trains weights themselves, and those of model.quantization "
                    f"{kind} are rounded to a few bits, which no gradient can move: choose lora or p_tuning, or "
                    "quantization none"
                )
        if kind != "none" and self.sft.init_lora_weights == "pissa":
            raise ValueError(
                "sft.init_lora_weights pissa takes the LoRA out of the weights, which those of model.quantization "
                f"{kind} cannot give: choose default, or quantization none"
            )
        if self.sft.use_dora and self.sft.init_lora_weights == "pissa":
            raise ValueError("sft.use_dora and sft.init_lora_weights pissa: the one's norms hide the other's start")
        for stage, section in (("sft", self.sft), ("reward", self.reward)):
            if section.loraplus_lr_ratio is not None and section.method != "lora":
                raise ValueError(f"{stage}.loraplus_lr_ratio is for LoRA's B, and {stage}.method is {section.method}")
        if kind.startswith("cpm-") and self.sft.use_dora:
            raise ValueError(f"sft.use_dora needs the weights' norms, which PEFT cannot read from {kind}: choose nf4")
        return self

    @model_validator(mode="after")
    def prefixes_stand_alone(self) -> Self:
        """A prefix cannot be merged, and a model has one at most."""
        for stage, section in self.tuned.items():
            if self.sft.method != "p_tuning" or stage == "sft" or (stage == "reward" and self.reward.init == "base"):
                continue
            if section.method == "p_tuning" and not section.resume_lora_training:
                raise ValueError(
                    f"{stage}.resume_lora_training false would put a second prefix on SFT's, which cannot be merged: "
                    "choose true, or method lora"
                )
            if section.method == "full":
                raise ValueError(
                    f"{stage}.method full would leave SFT's prefix outside of the weights that it saves: choose "
                    "p_tuning, lora or freeze"
                )
        return self

    @model_validator(mode="after")
    def trl_trains_a_lora(self) -> Self:
        if self.algorithm in ("kto", "grpo", "rloo") and self.sft.method != "lora":
            raise ValueError(f"algorithm {self.algorithm} trains the LoRA of SFT, but sft.method is {self.sft.method}")
        return self

    @model_validator(mode="after")
    def vllm_can_follow(self) -> Self:
        """Refuse policies that cannot be handed over to a server as one LoRA on plain weights."""
        if self.rollout.engine == "own" or self.algorithm not in ONLINE:
            return self
        section = self.tuned.get(self.algorithm)  # GRPO and RLOO always train a LoRA
        wanted = {
            f"{self.algorithm}.method": (section.method if section else "lora", "lora"),
            "model.quantization": (self.model.quantization, "none"),
            "launch.num_processes": (self.launch.num_processes, 1),
            "sft.use_dora": (self.sft.use_dora, False),
        }
        wrong = [f"{name} {found}, not {right}" for name, (found, right) in wanted.items() if found != right]
        if self.sft.method == "p_tuning":
            wrong.append("sft.method p_tuning, not lora, freeze or full")
        if wrong:
            raise ValueError(
                "rollout.engine vllm hands the policy over as one plain LoRA on plain weights, from one process "
                f"(found {'; '.join(wrong)})"
            )
        return self

    @model_validator(mode="after")
    def processes_can_share(self) -> Self:
        """Refuse what several processes cannot do together."""
        number, algorithm = self.launch.num_processes, self.algorithm
        if number == 1:
            return self
        section = getattr(self, algorithm)
        if isinstance(section, Kto | Grouped):
            if (what := section.uneven(number)) is not None:
                raise ValueError(f"launch.num_processes {number}: {algorithm}.{what}")
        else:
            shared = "mini_batch_size" if algorithm == "ppo" else "batch_size"
            size = getattr(section, shared)
            if size < number:
                raise ValueError(f"launch.num_processes {number} is more than the {size} of {algorithm}.{shared}")
        for stage in ("sft", "reward"):
            section = getattr(self, stage)
            if self.launch.strategy == "ddp" or section.method != "full" or section.optim == "adamw_torch_fused":
                continue
            raise ValueError(
                f"launch.strategy {self.launch.strategy} shares moments out over processes, which {stage}.optim "
                f"{section.optim} cannot: choose adamw_torch_fused"
            )
        return self


def load_params(path: str | Path = "params.yaml", overrides: dict[str, Any] | None = None) -> Params:
    """Read and validate a parameter file.

    `overrides` maps dotted names to values (`{"ppo.learning_rate": 2e-5}`) and is applied before validation.

    Raises:
        InputError: the file is missing or is not YAML, or one or more values are wrong; the message has a line a fault.
    """
    values = _read_yaml(Path(path))
    for name, value in (overrides or {}).items():
        _set_dotted(values, name, value)
    return validate_params(values, where=str(path))


def validate_params(values: Any, where: str = "params") -> Params:
    """Validate plain values against the schema. `where` names their source in the error's lines."""
    if not isinstance(values, dict):
        raise InputError(
            f"{where}: expected a mapping of sections ({', '.join(Params.model_fields)}), found {values!r}"
        )
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{where}: {_explain(fault)}" for fault in error.errors())) from None


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the parameters of a run are read from params.yaml in the project's root"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None


def _set_dotted(values: Any, name: str, value: Any) -> None:
    *sections, key = name.split(".")
    node = values
    for section in sections:
        if not isinstance(node, dict) or not isinstance(node.setdefault(section, {}), dict):
            raise InputError(f"overrides: {name!r}: {section!r} is not a section of params.yaml")
        node = node[section]
    node[key] = value


def _explain(fault: Any) -> str:
    """One line for one pydantic fault: the dotted name, what is wrong, the value."""
    location = [str(part) for part in fault["loc"]]
    name = ".".join(location) or "params"
    if fault["type"] == "extra_forbidden":
        known = _known_names(location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*location[:-1], nearest[0]])}?" if nearest else f"known here: {', '.join(known)}"
        )
        return f"unknown key {name}; {hint}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if fault["type"] == "value_error":
        return f"{name}: {message}"
    found = repr(fault["input"])
    return f"{name}: {message} (found {found if len(found) <= LONGEST else f'{found[:LONGEST]}…'})"


def _known_names(location: list[str]) -> list[str]:
    section: type[BaseModel] = Params
    for part in location:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return list(section.model_fields)


if __name__ == "__main__":
    print(json.dumps(Params.model_json_schema(), indent=2))
