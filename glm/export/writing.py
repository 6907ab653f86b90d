"""Writing the folder of an export, and proving it before it counts."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from glm.config import Export
from glm.errors import InputError
from glm.export import parity
from glm.export.authors import write_authors
from glm.export.card import model_card
from glm.export.facts import Facts
from glm.files import replace_folder, write_text
from glm.models import load_model, load_tokenizer
from glm.models.adapters import load_lora, save_lora
from glm.models.chatglm1 import ChatGLMForCausalLM
from glm.models.checkpoint import Checkpoint, local_folder
from glm.models.lineage import FILE_NAME, Lineage, source_of, write_lineage
from glm.models.methods import Tunable, method_of
from glm.models.prefix import prefix_of
from glm.models.quantization import BITSANDBYTES, BLOCK_LINEAR, CPM, bitsandbytes_config, keep_bitsandbytes_layout
from glm.models.saving import load_unmerged, probe_outputs, save_merged

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
SPARE = 1.05  # of the bytes of the weights: tokenizer, card, and what a file system takes


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked."""

    folder: Path
    parameters: int
    size: int  # bytes of all files
    tolerance: float  # of the largest logit: by how much loading it anew may differ from what it is compared with
    max_logit_difference: float  # from the source; of a quantised export, from the values that its weights stand for
    source_loss: float | None = None  # nats a token on parity.PAIRS, of a quantised export only
    loss: float | None = None
    prefix: bool = False  # whether a P-Tuning v2 prefix lies beside the weights
    plain: bool = False  # whether transformers reads it without this project

    @property
    def loss_increase(self) -> float:
        """By how much rounding has raised the loss; 0 of an export that was not quantised."""
        return 0.0 if self.loss is None or self.source_loss is None else self.loss - self.source_loss


def export(
    source: Lineage, out: str | Path, options: Export, facts: Facts, *, name: str = "", overwrite: bool = False
) -> Exported:
    """Write what `source` describes to the folder `out`, by `options`, with a card that tells `facts`.

    It is written beside `out` under another name, loaded again, compared with its source, and renamed. What is wrong
    with the options is told before a weight is read.

    Args:
        source: base model and adapters; those are merged, or (what: adapter) written alone.
        name: of the model, for the card's title; the folder's without it.
        overwrite: replace `out` if it holds an export.

    Raises:
        InputError: `out` is there already, the disk is too small, or the model cannot be had in this form.
        RuntimeError: what was written does not give what its source gives; `out` is as it was.
    """
    out = Path(out)
    check_target(out, source, overwrite)
    check_form(source, options)
    path, revision = source_of(source.base, source.revision)
    base = local_folder(path, revision)
    check_space(out, needed_bytes(base, source, options))
    hub_id = None if Path(path).is_dir() else path
    with replace_folder(out) as folder:
        if options.what == "adapter":
            exported = _write_adapter(source, out, folder)
        else:
            write = _write_whole if options.quantization == "none" else _write_rounded
            exported = write(source, folder, options, load_tokenizer(path, revision=revision), base, hub_id)
        for file in folder.iterdir():
            if file.is_file():  # safetensors writes for its user's eyes only; others are to load it
                file.chmod(0o644)
        exported = replace(exported, folder=out, size=sum(file.stat().st_size for file in folder.rglob("*")))
        write_text(folder / "README.md", model_card(name or out.name, source, hub_id, options, facts, exported))
    return exported


def check_target(out: Path, source: Lineage, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it is empty, or an export which may be overwritten and is not the source.

    Raises:
        InputError: says which it is.
    """
    parts = [Path(part).resolve() for part in (source.base, *source.adapters) if Path(part).exists()]
    if inside := [part for part in parts if part.is_relative_to(out.resolve())]:
        raise InputError(f"{out}: {inside[0]}, which is to be exported, lies there: choose another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; an export is a folder")
    if not overwrite:
        raise InputError(f"{out}: exists already; remove it, choose another folder, or say --overwrite")
    if not any((out / name).exists() for name in ("config.json", "adapter_config.json", FILE_NAME)):
        raise InputError(f"{out}: holds something else than a model: it is not overwritten")


def check_form(source: Lineage, options: Export) -> None:
    """Refuse what this source cannot be exported as.

    Raises:
        InputError: an adapter without adapters, or several that are not all plain LoRAs.
    """
    if options.what == "merged":
        return
    if not source.adapters:
        raise InputError(f"export.what adapter: {source.base} is a whole model, without an adapter: choose merged")
    kinds = [method_of(Path(adapter)) for adapter in source.adapters]
    if len(kinds) == 1:
        return
    if set(kinds) != {"lora"}:
        raise InputError(
            f"export.what adapter: {', '.join(kinds)} stand on each other, which one adapter cannot hold: choose merged"
        )
    for adapter in source.adapters:
        if json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8")).get("use_dora"):
            raise InputError(
                f"export.what adapter: {adapter} is a DoRA, which cannot be joined with others: use merged"
            )


def needed_bytes(base: Path, source: Lineage, options: Export) -> int:
    """Bytes that the export will take on the disk, roughly."""
    if options.what == "adapter":
        files = [file for adapter in source.adapters for file in Path(adapter).rglob("*")]
        return sum(file.stat().st_size for file in files)
    bits = (CPM | BITSANDBYTES).get(options.quantization)
    checkpoint = Checkpoint(base)
    total = 0.0
    for name, tensor in checkpoint.tensors.items():
        size = torch.Size(tensor.shape).numel()
        if tensor.dtype == "I8" and bits is None:
            size *= 2  # int4 perhaps, two values a byte
        total += size * (bits / 8 if bits and BLOCK_LINEAR.search(name) else ITEM_SIZE[options.dtype])
    checkpoint.close()
    return int(total * SPARE)


def check_space(out: Path, needed: int) -> None:
    """Raise an InputError unless the disk of `out` has `needed` bytes free."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(f"{out}: needs {needed / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB free")


def merged(source: Lineage, dtype: str) -> PreTrainedModel:
    """The whole model, rounded weights held in `dtype`, LoRAs in the weights; a prefix is beside them."""
    return load_model(
        source.base,
        adapters=source.adapters,
        dtype=dtype,
        quantization=source.quantization,
        double_quantization=source.double_quantization,
        revision=source.revision,
        dequantize=True,
    )


def _write_whole(
    source: Lineage, folder: Path, options: Export, tokenizer: PreTrainedTokenizerBase, base: Path, hub_id: str | None
) -> Exported:
    wanted = probe_outputs(load_unmerged(source, options.dtype))
    model = merged(source, options.dtype)
    beside = prefix_of(model) is not None
    if options.layout == "authors":
        write_authors(
            model, tokenizer, folder, base=base, hub_id=hub_id, bits=None, max_shard_size=options.max_shard_size
        )
    else:
        save_merged(model, tokenizer, folder, max_shard_size=options.max_shard_size, prefix_beside=True)
    load = load_model if beside or options.layout == "authors" else AutoModelForCausalLM.from_pretrained
    found = probe_outputs(load(folder, dtype=options.dtype))
    tolerance = parity.INT8_TOLERANCE if source.quantization == "int8" else parity.TOLERANCE[options.dtype]
    difference = parity.logit_difference(found, wanted, tolerance, str(folder))
    plain = options.layout == "transformers" and not beside and not isinstance(model, ChatGLMForCausalLM)
    return Exported(folder, model.num_parameters(), 0, tolerance, difference, prefix=beside, plain=plain)


def _write_rounded(
    source: Lineage, folder: Path, options: Export, tokenizer: PreTrainedTokenizerBase, base: Path, hub_id: str | None
) -> Exported:
    model = merged(source, options.dtype)
    source_loss = parity.answer_loss(model, tokenizer)
    size = options.max_shard_size
    bits = CPM.get(options.quantization)
    if bits:
        write_authors(model, tokenizer, folder, base=base, hub_id=hub_id, bits=bits, max_shard_size=size)
        parity.round_weights(model, bits)
    else:
        if prefix_of(model) is not None:
            raise InputError("export.quantization nf4: a P-Tuning v2 prefix has no place in it; choose cpm-int4")
        rounded = quantised(model, options.quantization)
        rounded.save_pretrained(str(folder), max_shard_size=size)
        tokenizer.save_pretrained(str(folder))
        model = rounded.dequantize(model.dtype)
    found = load_model(folder, dtype=options.dtype)
    logits, loss = probe_outputs(found), parity.answer_loss(found, tokenizer)
    tolerance = parity.TOLERANCE[options.dtype]
    difference = parity.logit_difference(logits, probe_outputs(model), tolerance, str(folder))
    parity.check_rounded(found, model, str(folder))
    plain = bits is None and not isinstance(model, ChatGLMForCausalLM)
    return Exported(folder, model.num_parameters(), 0, tolerance, difference, source_loss, loss, plain=plain)


def quantised(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """A copy of `model` in bitsandbytes' nf4."""
    rounded = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        quantization_config=bitsandbytes_config(quantization, model.dtype, double_quantization=True),
    )
    keep_bitsandbytes_layout(rounded)
    return rounded.eval()


def _write_adapter(source: Lineage, out: Path, folder: Path) -> Exported:
    """Copy the adapter, or join several LoRAs into one; what it stands on is recorded anew, as seen from `out`."""
    wanted = probe_outputs(load_unmerged(source))
    method = method_of(Path(source.adapters[-1]))
    below = replace(source, adapters=())
    base, _ = source_of(source.base, source.revision)
    if len(source.adapters) > 1:
        model = load_joined(source)
        save_lora(model, folder, base=base, name="joined")
    else:
        shutil.copytree(source.adapters[0], folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILE_NAME))
        if method == "lora":
            path = folder / "adapter_config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config |= {"base_model_name_or_path": base, "revision": source_of(source.base, source.revision)[1]}
            write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_lineage(out, folder, method, below)
    found = load_unmerged(replace(below, adapters=(str(folder),)))
    dtype = str(found.dtype).removeprefix("torch.")
    difference = parity.logit_difference(probe_outputs(found), wanted, parity.TOLERANCE[dtype], str(folder))
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in _tensors(folder))
    return Exported(folder, parameters, 0, parity.TOLERANCE[dtype], difference)


def load_joined(source: Lineage) -> PeftModel:
    """The model with all its LoRAs joined into one, "joined", whose matrices are theirs side by side."""
    model: Tunable = load_model(
        source.base,
        dtype=source.dtype,
        quantization=source.quantization,
        double_quantization=source.double_quantization,
        revision=source.revision,
    )
    names = [f"part_{number}" for number in range(len(source.adapters))]
    for name, adapter in zip(names, source.adapters, strict=True):
        model = load_lora(model, adapter, name=name)
    assert isinstance(model, PeftModel)
    model.add_weighted_adapter(names, [1.0] * len(names), "joined", combination_type="cat")
    return model


def _tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
