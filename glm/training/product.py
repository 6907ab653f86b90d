"""Products of frozen weights in float32 on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def on_cpu(weight: Tensor) -> bool:
    """Whether `product` is for this weight."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN, whose float32 products take under half the time of MKL's on an AMD CPU with AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return F.linear(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
