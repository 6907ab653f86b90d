"""Saving adapters and merged models, each checked before it counts: loaded again, it must give the same outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.config import Method
from glm.errors import InputError
from glm.files import replace_folder
from glm.models import methods
from glm.models.adapters import causal_lm, load_lora, plain_name, save_lora, save_score
from glm.models.chatglm1 import ChatGLMConfig
from glm.models.checkpoint import Checkpoint
from glm.models.lineage import Lineage, above, write_lineage
from glm.models.loading import load_model
from glm.models.methods import Tunable
from glm.models.prefix import BESIDE, prefix_of, read_prefix, write_prefix

CHECKED = "reload_check"  # the name under which a saved LoRA is loaded beside the one it was saved from


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
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


def save_trained(
    model: Tunable,
    method: Method,
    folder: str | Path,
    below: Lineage,
    *,
    name: str = "default",
    weights: dict[str, nn.Parameter] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    score: nn.Linear | None = None,
) -> None:
    """Save what `method` has trained on `model`, and what that stands on, as the one folder of a stage.

    `name` is the LoRA's; `weights` are those that freeze and full have trained, by plain name, unless it is all that
    requires a gradient. A whole model (full) comes with its `tokenizer`. `score` is the head of a reward model. What
    was written is read again and compared (RuntimeError if it differs, and `folder` is left as it was).
    """
    causal = causal_lm(model)
    if weights is None:
        weights = {plain_name(key): value for key, value in methods.trained_parameters(causal).items()}
    with replace_folder(folder) as temporary:
        if isinstance(model, PeftModel) and method == "lora":
            save_lora(model, temporary, base=below.base, name=name)
            wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            found = load_file(temporary / "adapter_model.safetensors")
        elif method == "p_tuning":
            write_prefix(causal, temporary)
            wanted = causal.base_model.prefix_encoder.state_dict()
            found = read_prefix(causal, temporary).state_dict()
        elif method == "freeze":
            wanted = dict(weights)
            methods.write_weights(wanted, temporary)
            found = methods.read_weights(temporary)
        else:
            wanted = dict(weights)
            causal.save_pretrained(temporary, state_dict={key: value.detach() for key, value in weights.items()})
            found = _read_all(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        wrong = [key for key in wanted if key not in found or not torch.equal(found[key], wanted[key].cpu())]
        if wrong:
            raise RuntimeError(f"{folder}: not saved: read again, {wrong[0]} is not what was trained")
        if score is not None:
            save_score(temporary, score)
        write_lineage(folder, temporary, method, below)


def _read_all(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    found = {name: checkpoint.read(name) for name in checkpoint.tensors}
    checkpoint.close()
    return found


def as_trained(folder: str | Path, dtype: str | None = None) -> Tunable:
    """The model of an artifact with its last part as it was trained: a LoRA beside the weights, not in them."""
    return load_unmerged(above(folder), dtype)


def load_unmerged(source: Lineage, dtype: str | None = None) -> Tunable:
    """The model that `source` describes; if the last adapter is a LoRA, it is beside the weights, not in them."""
    beside = bool(source.adapters) and methods.method_of(Path(source.adapters[-1])) == "lora"
    model = load_model(
        source.base,
        adapters=source.adapters[:-1] if beside else source.adapters,
        dtype=dtype or source.dtype,
        quantization=source.quantization,
        double_quantization=source.double_quantization,
        revision=source.revision,
    )
    return load_lora(model, source.adapters[-1]).eval() if beside else model


def save_merged(
    model: Tunable,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    max_shard_size: str = "5GB",
    *,
    prefix_beside: bool = False,
) -> PreTrainedModel:
    """Save a whole model with its tokenizer, chat template included, in safetensors; LoRA is merged into it first.

    Merging changes `model` itself; the merged model is returned. ChatGLM2, ChatGLM3 and GLM-4 become folders that
    `AutoModelForCausalLM.from_pretrained` loads without this project. The folder is loaded again and must give the same
    outputs (RuntimeError otherwise, and `folder` is left as it was). Raises InputError for what cannot be merged: LoRA
    on a quantised base, and prefixes. With `prefix_beside` a prefix goes into the sub-folder "prefix", where
    `load_model` finds it; transformers alone would not.
    """
    if not isinstance(model, PreTrainedModel):
        if getattr(model.get_base_model(), "is_quantized", False):
            raise InputError(f"{folder}: LoRA cannot be merged into a quantised base; load it without quantization")
        model = model.merge_and_unload()
    if prefix_of(model) is not None and not prefix_beside:
        raise InputError(f"{folder}: a P-Tuning v2 prefix cannot be merged into weights; save it as an adapter")
    with replace_folder(folder) as temporary:
        weights = {name: value for name, value in model.state_dict().items() if "prefix_encoder." not in name}
        model.save_pretrained(str(temporary), state_dict=weights, max_shard_size=max_shard_size)
        if prefix_of(model) is not None:
            (temporary / BESIDE).mkdir()
            write_prefix(model, temporary / BESIDE)
        tokenizer.save_pretrained(str(temporary))
        head = type(model).__name__.endswith("ForSequenceClassification")
        reloaded = load_model(
            temporary,
            dtype=model.dtype,
            device=model.device,
            attn_implementation=model.config._attn_implementation.removesuffix("_prefix"),
            task="sequence_classification" if head else "causal_lm",
            num_labels=model.config.num_labels,
        )
        check_same(probe_outputs(model), probe_outputs(reloaded), folder)
    return model


def probe_outputs(model: Tunable) -> Tensor:
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
def _as_it_was(model: PeftModel) -> Iterator[None]:
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
