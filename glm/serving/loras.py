"""LoRAs that come and go while a model is served; each request names the one that it wants, or none."""

import warnings
from itertools import count
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from glm.errors import InputError
from glm.generation import decode_step
from glm.models.adapters import load_lora


class Loras:
    """The LoRAs on one model, by the names that clients give them. "" is the model as it is; one is active at a time.

    Everything here changes the model: call it where nothing is being computed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.base = model
        self.model: PreTrainedModel | PeftModel = model
        self.active = ""
        self.folders: dict[str, Path] = {}
        self._peft_names: dict[str, str] = {}  # PEFT allows no dots in its own
        self._numbers = count()

    def load(self, name: str, folder: Path) -> None:
        """Add the LoRA in `folder`, in PEFT's format, as `name`; what is active stays active.

        Raises:
            InputError: the name is taken, or there is no LoRA for this model.
        """
        if name in self.folders:
            raise InputError(f"lora_name: the adapter {name!a} has already been loaded")
        self._try(folder)
        peft_name = f"lora_{next(self._numbers)}"
        self.model = load_lora(self.model, folder, name=peft_name).eval()  # its dropout is new
        self.folders[name], self._peft_names[name] = folder, peft_name
        self.use(self.active)

    def _try(self, folder: Path) -> None:
        """Load onto a model without storage: what fails halfway would leave its traces in the one that is served."""
        with torch.device("meta"):
            skeleton = type(self.base)(self.base.config)
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that copying does nothing there
                load_lora(skeleton, folder)
        except InputError:
            raise
        except Exception as error:  # PEFT's own, as many as there are ways to break a config
            raise InputError(f"lora_path: {folder}: not a LoRA of this model: {error!r}") from None
        if decode_step.supports(self.base) and not decode_step.supports(skeleton):
            raise InputError(f"lora_path: {folder}: of a kind that cannot be served here: plain LoRAs can")

    def unload(self, name: str) -> None:
        """Forget a LoRA that is loaded, and not active."""
        del self.folders[name]
        assert isinstance(self.model, PeftModel)
        self.model.delete_adapter(self._peft_names.pop(name))

    def use(self, name: str) -> None:
        """Let the model compute with this LoRA."""
        if isinstance(self.model, PeftModel):
            if name:
                self.model.base_model.enable_adapter_layers()
                self.model.base_model.set_adapter([self._peft_names[name]], inference_mode=True)
            else:
                self.model.base_model.disable_adapter_layers()
        self.active = name
