"""Saving adapters and merged models, each checked before it counts: loaded again, it must give the same outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.errors import InputError
from glm.files import replace_folder
from glm.models.adapters import save_lora
from glm.models.chatglm1 import ChatGLMConfig
from glm.models.loading import load_model
from glm.models.prefix import read_prefix, write_prefix

if TYPE_CHECKING:
    from peft import PeftModel

CHECKED = "reload_check"  # the name under which a saved LoRA is loaded beside the one it was saved from


def save_adapter(model: "PeftModel", folder: str | Path, adapter_name: str = "default") -> None:
    """Save one LoRA adapter of `model` in PEFT's format, with the modules trained beside it (a score head).

    It is loaded again under another name and must give the same outputs (RuntimeError otherwise, and `folder` is left
    as it was). Which adapters are active and what is trainable is the same afterwards as before.
    """
    with replace_folder(folder) as temporary:
        save_lora(model, temporary, base=model.config.name_or_path, name=adapter_name)
        with _as_it_was(model):
            model.set_adapter(adapter_name)
            before = probe_outputs(model)
            model.load_adapter(str(temporary), adapter_name=CHECKED)
            try:
                model.set_adapter(CHECKED)
                check_same(before, probe_outputs(model), folder)
            finally:
                model.delete_adapter(CHECKED)


def save_prefix_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Save the P-Tuning v2 prefix of `model`; loaded again in its place it must give the same outputs."""
    encoder = model.base_model.prefix_encoder
    with replace_folder(folder) as temporary:
        write_prefix(model, temporary)
        before = probe_outputs(model)
        try:
            model.base_model.prefix_encoder = read_prefix(model, temporary).to(model.device)
            check_same(before, probe_outputs(model), folder)
        finally:
            model.base_model.prefix_encoder = encoder


def save_merged(
    model: "PreTrainedModel | PeftModel",
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    max_shard_size: str = "5GB",
) -> PreTrainedModel:
    """Save a whole model with its tokenizer, chat template included, in safetensors; LoRA is merged into it first.

    Merging changes `model` itself; the merged model is returned. ChatGLM2, ChatGLM3 and GLM-4 become folders that
    `AutoModelForCausalLM.from_pretrained` loads without this project. The folder is loaded again and must give the same
    outputs (RuntimeError otherwise, and `folder` is left as it was). Raises InputError for what cannot be merged: LoRA
    on a quantised base, and prefixes.
    """
    if not isinstance(model, PreTrainedModel):
        if getattr(model.get_base_model(), "is_quantized", False):
            raise InputError(f"{folder}: LoRA cannot be merged into a quantised base; load it without quantization")
        model = model.merge_and_unload()
    if hasattr(model.base_model, "prefix_encoder"):
        raise InputError(f"{folder}: a P-Tuning v2 prefix cannot be merged into weights; save it as an adapter")
    with replace_folder(folder) as temporary:
        model.save_pretrained(str(temporary), max_shard_size=max_shard_size)
        tokenizer.save_pretrained(str(temporary))
        head = type(model).__name__.endswith("ForSequenceClassification")
        reloaded = load_model(
            temporary,
            dtype=model.dtype,
            device=model.device,
            attn_implementation=model.config._attn_implementation,
            task="sequence_classification" if head else "causal_lm",
            num_labels=model.config.num_labels,
        )
        check_same(probe_outputs(model), probe_outputs(reloaded), folder)
    return model


def probe_outputs(model: "PreTrainedModel | PeftModel") -> Tensor:
    """Outputs of `model` (logits or scores) for two fixed rows of tokens, the second one padded on the left."""
    config = model.config
    ids: list[int | None] = [token for token in range(5, min(29, config.vocab_size)) if token != config.pad_token_id]
    if isinstance(config, ChatGLMConfig):
        ids[12:12] = [config.gmask_token_id, config.bos_token_id]
    input_ids = torch.tensor([ids, ids], device=model.device)
    attention_mask = torch.ones_like(input_ids)
    if config.pad_token_id is not None:
        input_ids[1, :3], attention_mask[1, :3] = config.pad_token_id, 0
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=input_ids, attention_mask=attention_mask).logits
    model.train(training)
    return logits if logits.dim() == 2 else logits[attention_mask.bool()]


def check_same(before: Tensor, after: Tensor, folder: str | Path) -> None:
    """Raise RuntimeError unless the outputs agree up to the rounding of their dtype (another kernel may be chosen)."""
    difference = (before.float() - after.float()).abs().max().item()
    allowed = 8 * torch.finfo(before.dtype).eps * max(1.0, before.abs().max().item())
    if not difference <= allowed:  # also false for NaN
        raise RuntimeError(f"{folder}: not saved: loaded again, it gives outputs that differ by {difference:.2e}")


@contextmanager
def _as_it_was(model: "PeftModel") -> Iterator[None]:
    """Restore mode, active adapters and what is trainable: PEFT changes them when it loads and switches adapters."""
    training, active = model.training, list(model.active_adapters)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        model.train(training)
        model.base_model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
