"""Several tuned forms of one model in memory, of which one is in use: LoRAs, prefixes and weights are swapped.

    variants = Variants(load_model("models/base"))
    variants.add("sft", "models/sft")
    variants.add_trained("policy", "lora", shape, below=(), copy_of="models/sft")
    variants.use("policy")

A LoRA or prefix costs its own size. Weights of method freeze cost theirs, and method full a copy of the model. "base"
is the model as it was given. Only the trained variant's parameters ever require a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from glm.config import Method, Sft
from glm.errors import InputError
from glm.models import adapters, lineage, methods
from glm.models.adapters import causal_lm, plain_name
from glm.models.loading import load_model
from glm.models.methods import Tunable
from glm.models.prefix import PrefixEncoder, build_prefix, prefix_of, read_prefix, use_prefix

BASE = "base"


@dataclass
class Variant:
    """What distinguishes one form of the model."""

    loras: list[str] = field(default_factory=list)  # PEFT's names, all active
    prefix: PrefixEncoder | None = None
    weights: dict[str, nn.Parameter] = field(default_factory=dict)  # in the place of the model's, by plain name


class Variants:
    """The variants of `base`, which stands on nothing, or already on the artifacts `beneath`."""

    def __init__(self, base: PreTrainedModel, beneath: Sequence[str | Path] = ()) -> None:
        self.model: Tunable = base.requires_grad_(False)
        self.beneath = tuple(map(str, beneath))
        self.variants = {BASE: Variant(adapters.active_loras(base), prefix_of(base))}
        self.active = BASE
        self.trained: dict[str, nn.Parameter] = {}
        self._trained_variant = ""
        # The weights that are in place where a variant brings none, and where: tied ones have several places.
        self._own = {
            plain_name(name): parameter
            for name, parameter in base.named_parameters()
            if ".lora_" not in name and "prefix_encoder." not in name
        }
        names = {id(parameter): name for name, parameter in self._own.items()}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._own}
        for module in base.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in names:
                    self._places[names[id(parameter)]].append((module, leaf))

    def add(self, name: str, folder: str | Path) -> None:
        """Add the artifact in `folder`, with all that it stands on, under `name`.

        A folder without stands_on.json is put on `base` alone.
        """
        known = Path(folder, lineage.FILE_NAME).exists()
        self.add_chain(name, lineage.chain(folder) if known else (*self.beneath, str(folder)))

    def add_chain(self, name: str, parts: Sequence[str]) -> None:
        """Add the artifacts `parts`, each on the one before, under `name`; without any it is the bare base."""
        self.variants[name] = self._variant(name, parts)

    def add_trained(
        self,
        name: str,
        method: Method,
        shape: Sft,
        *,
        below: Sequence[str],
        copy_of: str | Path | None = None,
    ) -> None:
        """Add the variant that will be trained by `method`: fresh in `shape`, or as a copy of `copy_of`.

        `below` are the artifacts that it stands on, those beneath the base among them.
        """
        variant = self._variant(f"{name}_below", below)
        if method in ("freeze", "full") and len(variant.loras) > len(self.variants[BASE].loras):
            variant = self._whole(below[-1], variant)  # weights that are trained on a LoRA hold it when they are saved
        causal = causal_lm(self.model)
        if method == "lora":
            self.use(BASE)
            if copy_of is None:
                plain = shape.model_copy(update={"init_lora_weights": "default"})  # PiSSA would change all variants
                self.model = adapters.add_lora(self.model, plain, name)
            else:
                self.model = adapters.load_lora(self.model, copy_of, name=name, trainable=True)
            variant.loras = [*variant.loras, name]
            self.trained = {key: p for key, p in self.model.named_parameters() if f".{name}." in key}
        elif method == "p_tuning":
            if variant.prefix is not None and copy_of is None:
                raise InputError("method p_tuning on a prefix: a model takes one: go on training it")
            encoder = (
                build_prefix(causal, shape.pre_seq_len, shape.prefix_projection)
                if copy_of is None
                else read_prefix(causal, Path(copy_of))
            )
            variant.prefix = encoder.to(causal.device).eval()
            self.trained = dict(variant.prefix.named_parameters())
        else:
            self._train_weights(variant, method, shape, copy_of)
        self.variants[name], self._trained_variant = variant, name
        self.active = ""
        self.use(name)

    def use(self, name: str) -> None:
        """Put a variant in place; cheap where it is already."""
        if name == self.active:
            return
        variant, causal = self.variants[name], causal_lm(self.model)
        if isinstance(self.model, PeftModel):
            if variant.loras:
                self.model.base_model.enable_adapter_layers()
                self.model.base_model.set_adapter(variant.loras, inference_mode=True)
            else:
                self.model.base_model.disable_adapter_layers()
        if prefix_of(causal) is not variant.prefix:
            use_prefix(causal, variant.prefix)
        for key, places in self._places.items():
            parameter = variant.weights.get(key, self._own[key])
            for module, leaf in places:
                if module._parameters[leaf] is not parameter:
                    module._parameters[leaf] = parameter
        for parameter in self.trained.values():
            parameter.requires_grad_(name == self._trained_variant)
        self.active = name

    def finish(self) -> None:
        """Bring weights that were trained in float32 back to the model's dtype, which is what will be loaded."""
        if self.variants[self._trained_variant].weights:
            for parameter in self.trained.values():
                parameter.data = parameter.data.to(methods.loaded_dtype(causal_lm(self.model)))

    def _variant(self, name: str, parts: Sequence[str]) -> Variant:
        root = self.variants[BASE]
        variant = Variant(list(root.loras), root.prefix)
        shared = tuple(parts[: len(self.beneath)]) == self.beneath
        rest = parts[len(self.beneath) :] if shared else parts
        kinds = [methods.method_of(Path(part)) for part in rest]
        if not shared or "full" in kinds or ("freeze" in kinds and "lora" in kinds[: kinds.index("freeze")]):
            return self._whole(rest[-1], variant)
        causal = causal_lm(self.model)
        for part, kind in zip(rest, kinds, strict=True):
            if kind == "lora":
                lora = f"{name}_{len(variant.loras)}" if part != rest[-1] else name
                self.use(BASE)
                self.model = adapters.load_lora(self.model, part, name=lora)
                variant.loras.append(lora)
                self.active = ""
            elif kind == "p_tuning":
                variant.prefix = read_prefix(causal, Path(part)).to(causal.device).requires_grad_(False).eval()
            else:
                for key, weight in methods.read_weights(Path(part)).items():
                    like = self._own[key]
                    variant.weights[key] = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
        return variant

    def _whole(self, artifact: str, variant: Variant) -> Variant:
        """All weights of an artifact, merged: what cannot be told apart as changes of the base."""
        causal = causal_lm(self.model)
        if getattr(causal, "is_quantized", False):
            raise InputError(f"{artifact}: a whole model cannot take the place of a quantised base")
        whole = load_model(artifact, dtype=methods.loaded_dtype(causal), device=causal.device)
        variant.loras, variant.prefix = [], prefix_of(whole)
        variant.weights = {
            key: parameter.requires_grad_(False) for key, parameter in whole.named_parameters() if key in self._own
        }
        return variant

    def _train_weights(self, variant: Variant, method: Method, shape: Sft, copy_of: str | Path | None) -> None:
        causal = causal_lm(self.model)
        if getattr(causal, "is_quantized", False):
            raise InputError(f"method {method} trains weights themselves; those of this model are quantised")
        if copy_of is not None and method == "freeze":
            start = methods.read_weights(Path(copy_of))
        else:
            names = list(self._own)
            if method == "freeze":
                names = [plain_name(name) for name in methods.chosen_weights(causal, shape)]  # LoRAs may be on them
            start = {name: variant.weights.get(name, self._own[name]).detach() for name in names}
        device = causal.device
        self.trained = {
            name: nn.Parameter(weight.to(device, torch.float32, copy=True)) for name, weight in start.items()
        }
        variant.weights = variant.weights | self.trained
