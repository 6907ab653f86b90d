"""What keeps a training from running for nothing: estimates and a try before the first step, a watch on every loss."""

import logging
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glm.config import Method, Training
from glm.errors import InputError
from glm.files import write_json
from glm.models.adapters import causal_lm, trainable_count
from glm.models.methods import Tunable, trained_parameters
from glm.training.layers import decoder_layers, memory_estimate, optimizer_bytes, trained_depth
from glm.training.plan import Plan, free_memory

# Learning rate times steps is about how far Adam can move a weight. LoRA's B and a prefix start far from where they
# must go; weights of a trained model hardly move at all. Below the first number a run changes nothing that one could
# see; above the second a learning rate tends to destroy the model.
REACH = {"lora": 2e-3, "p_tuning": 2e-3, "freeze": 5e-5, "full": 5e-5}
STEEP = {"lora": 2e-2, "p_tuning": 2e-1, "freeze": 1e-3, "full": 1e-3}
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}  # bf16, dense

logger = logging.getLogger(__name__)


def say_what_comes(model: Tunable, method: Method, params: Training, plan: Plan, *, stage: str) -> None:
    """Log parameters, steps, tokens and a process's memory, and warn of a learning rate that cannot be meant."""
    trained, total = trainable_count(model)
    causal = causal_lm(model)
    state = optimizer_bytes(model, params.optim) // plan.holders
    how: dict[str, Any] = {"compiled": plan.compiled, "copied_keys": plan.copied_keys}
    step = memory_estimate(causal, plan.row_tokens, state, plan.checkpointing, **how)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()) // plan.holders
    logger.info(
        "%s: %s trains %s of %s parameters (%.3f %%); %d steps; %s tokens an epoch; about %.2f GB: weights %.2f, "
        "a step %.2f",
        *(stage, method, f"{trained:,}", f"{total:,}", 100 * trained / total, plan.steps, f"{plan.epoch_tokens:,}"),
        *((weights + step) / 1e9, weights / 1e9, step / 1e9),
    )
    reach = params.learning_rate * plan.steps
    if reach < REACH[method]:
        logger.warning(
            "%s: %d steps at a learning rate of %g can hardly change anything with method %s: the product should be %g "
            "or more",
            *(stage, plan.steps, params.learning_rate, method, REACH[method]),
        )
    if params.learning_rate > STEEP[method]:
        logger.warning(
            "%s: a learning rate of %g is steep for method %s; above %g a model tends to forget what it knew",
            *(stage, params.learning_rate, method, STEEP[method]),
        )


def try_largest(model: nn.Module, micro_batch: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    """Compute the largest micro-batch forward and back once, so that it fails now and not in the middle of a run.

    Raises:
        InputError: the GPU's memory is too small for it.
    """
    try:
        model.train()
        model(**micro_batch).backward()
    except torch.OutOfMemoryError as error:
        tokens = micro_batch["input_ids"].numel()
        raise InputError(
            f"the largest batch, {tokens} tokens, does not fit the GPU's memory ({free_memory() / 1e9:.1f} GB left): "
            "lower tokens_per_forward or per_device_train_batch_size, or set activation_checkpointing full, a smaller "
            "optim, or model.quantization nf4"
        ) from error
    finally:
        for parameter in parameters:
            parameter.grad = None


class LossWatch:
    """Keeps the steps since the last look, and stops on a loss or gradient that is NaN, infinite or exactly zero.

    Losses stay on the device until a look, so that no step waits for it. The first bad step's batch is written to
    `folder`, whose name the error tells.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: deque[tuple[int, Tensor, list[dict[str, Any]]]] = deque()

    def keep(self, step: int, loss: Tensor, micro_batches: list[dict[str, Any]]) -> None:
        """Remember one step's loss [] and its inputs, which are on the CPU."""
        self.steps.append((step, loss, micro_batches))

    def look(self) -> None:
        """Raise FloatingPointError if one of the steps went wrong, and forget them."""
        losses = torch.stack([loss for _, loss, _ in self.steps]).tolist() if self.steps else []
        for loss, (step, _, micro_batches) in zip(losses, self.steps, strict=True):
            if math.isfinite(loss) and loss != 0.0:
                continue
            path = self.folder / f"stopped-step-{step}.json"
            write_json(
                path, {"step": step, "loss": str(loss), "micro_batches": [_plain(part) for part in micro_batches]}
            )
            advice = (
                "nothing is left to learn, or half precision underflows" if loss == 0 else "lower the learning rate"
            )
            raise FloatingPointError(f"loss is {loss} at step {step}: {advice}; the step's batch is in {path}")
        self.steps.clear()


def check_gradients(model: nn.Module) -> bool:
    """Whether any trained parameter but a reward head has a gradient other than zero."""
    trained = trained_parameters(model)
    return any(
        parameter.grad is not None and bool(parameter.grad.any())
        for name, parameter in trained.items()
        if not name.endswith("score.weight")
    )


def flops_per_token(model: PreTrainedModel) -> float:
    """Operations that training needs for a token, recomputation not counted: 2 a weight of the layers forward, as many
    for the gradient of the activations where it goes, and 2 more a trained one. Attention and head are left out.
    """
    layers = decoder_layers(model)
    lowest = len(layers) - trained_depth(model, layers)
    total = 0
    for number, layer in enumerate(layers):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        weights = sum(linear.in_features * linear.out_features for linear in linears)
        trained = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
        total += (4 if number >= lowest else 2) * weights + 2 * trained
    return float(total)


def peak_flops() -> float | None:
    """Dense bfloat16 operations a second of this GPU, None where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in name), None)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, dict) else value
