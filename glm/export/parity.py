"""The exported folder, loaded anew, against what it was made from."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.models.methods import Tunable
from glm.models.quantization import BLOCK_LINEAR, pack, row_scales, unpack

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest logit: what rounding may change
INT8_TOLERANCE = 1e-1  # bitsandbytes' int8 rounds activations too, which a merged model does not

# Questions and answers on which the loss of a rounded model is compared with that of its source.
PAIRS = (
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("一年有几个季节？", "一年有四个季节：春天、夏天、秋天和冬天。"),
    ("用一句话介绍长江。", "长江是中国最长的河流，发源于青藏高原，在上海附近流入东海。"),
    ("房间怎么样？", "房间很干净，床也舒服，就是离车站有点远。"),
    ("把“早上好”翻译成英文。", "Good morning."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("2 加 3 等于多少？", "2 加 3 等于 5。"),
)


def logit_difference(found: Tensor, wanted: Tensor, allowed: float, what: str) -> float:
    """The largest difference between two sets of logits.

    Raises:
        RuntimeError: it is above `allowed` times the largest wanted logit, or no number.
    """
    difference = (found.float() - wanted.float()).abs().max().item()
    if not difference <= allowed * wanted.float().abs().max().item():  # also false for NaN
        raise RuntimeError(f"{what}: its logits differ from those of its source by {difference:.2e}")
    return difference


def check_rounded(found: PreTrainedModel, wanted: PreTrainedModel, what: str) -> None:
    """Compare the weights that a quantised model stands for with those it should, exactly. `found` is dequantised.

    Raises:
        RuntimeError: one differs.
    """
    values = dict(found.dequantize(wanted.dtype).named_parameters())
    for name, parameter in wanted.named_parameters():
        if not torch.equal(values[name], parameter):
            raise RuntimeError(f"{what}: {name}, read again, does not stand for the values that were written")


def round_weights(model: PreTrainedModel, bits: int) -> None:
    """Put in the place of the blocks' linear weights what they are once packed into int4 or int8, as the authors do."""
    for name, parameter in model.named_parameters():
        if BLOCK_LINEAR.search(f".{name}"):
            parameter.data = unpack(pack(parameter, bits), row_scales(parameter, bits), bits, parameter.dtype)


@torch.no_grad()
def answer_loss(model: Tunable, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]] = PAIRS) -> float:
    """Mean loss in nats a token of the answers, each after its question."""
    total, count = 0.0, 0
    for question, answer in pairs:
        prompt = len(tokenizer(question)["input_ids"])
        ids = torch.tensor([tokenizer(question, answer)["input_ids"]], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, prompt - 1 : -1].float()
        total += F.cross_entropy(logits, ids[0, prompt:], reduction="sum").item()
        count += ids.shape[1] - prompt
    return total / count
