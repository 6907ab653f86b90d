"""Merge the policy into the base: models/export, which plain transformers loads, checked to give the same logits.

A base that was quantised for training is written with its rounded values in export.dtype, on which the adapters were
trained. A P-Tuning v2 prefix cannot be merged: it lies beside the model, in models/export/prefix, where `load_model`
finds it, and transformers alone does not.
"""

import logging

from tasks.base_model import load_base_tokenizer
from tasks.stage import Stage, main

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest logit: what rounding may change
INT8_TOLERANCE = 1e-1  # bitsandbytes' int8 rounds activations too, which a merged model does not

logger = logging.getLogger("glm.export")


def run(stage: Stage) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from glm.models import load_model
    from glm.models.lineage import read_lineage
    from glm.models.prefix import prefix_of
    from glm.models.saving import as_trained, probe_outputs, save_merged

    options, policy = stage.params.export, f"models/{stage.params.algorithm}"
    _, below = read_lineage(policy)
    tokenizer = load_base_tokenizer()
    wanted = probe_outputs(as_trained(policy, dtype=options.dtype)).float()
    model = load_model(policy, dtype=options.dtype, dequantize=True)
    beside = prefix_of(model) is not None
    merged = save_merged(model, tokenizer, "models/export", max_shard_size=options.max_shard_size, prefix_beside=True)
    if beside:
        logger.warning("export: the prefix lies in models/export/prefix, where only glm.models.load_model looks for it")
    load = load_model if beside else AutoModelForCausalLM.from_pretrained
    difference = (probe_outputs(load("models/export", dtype=options.dtype)).float() - wanted).abs().max().item()
    tolerance = INT8_TOLERANCE if below is not None and below.quantization == "int8" else TOLERANCE[options.dtype]
    if not difference <= tolerance * wanted.abs().max().item():  # also false for NaN
        raise RuntimeError(f"models/export: its logits differ from those of {policy} by {difference:.2e}")
    stage.log_model("models/export")
    return {
        "max_logit_difference": difference,
        "parameters": sum(parameter.numel() for parameter in merged.parameters()),
    }


if __name__ == "__main__":
    main("export", run)
