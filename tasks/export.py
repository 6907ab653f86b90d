"""Merge the policy into the base: models/export, which plain transformers loads, checked to give the same logits."""

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.base_model import base_source, load_base_tokenizer
from tasks.stage import Stage, main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest logit: what rounding may change


def run(stage: Stage) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from glm.models import load_model
    from glm.models.adapters import load_lora
    from glm.models.saving import probe_outputs, save_merged

    options, policy = stage.params.export, Path("models", stage.params.algorithm)
    path, revision = base_source()
    tokenizer = load_base_tokenizer()
    adapted = load_lora(load_model(path, dtype=options.dtype, revision=revision), policy)
    wanted = probe_outputs(adapted).float()
    merged = save_merged(adapted, tokenizer, "models/export", max_shard_size=options.max_shard_size)
    exported: PreTrainedModel = AutoModelForCausalLM.from_pretrained("models/export", dtype=options.dtype)
    difference = (probe_outputs(exported).float() - wanted).abs().max().item()
    if not difference <= TOLERANCE[options.dtype] * wanted.abs().max().item():  # also false for NaN
        raise RuntimeError(f"models/export: its logits differ from base + {policy} by {difference:.2e}")
    stage.log_model("models/export")
    return {
        "max_logit_difference": difference,
        "parameters": sum(parameter.numel() for parameter in merged.parameters()),
    }


if __name__ == "__main__":
    main("export", run)
