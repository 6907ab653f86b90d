"""A base model small enough that training it takes a second: the embedded shape, untrained, with a real tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import GlmForCausalLM

from glm.config import EmbeddedModel
from glm.models import embedded, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(GOLDEN / "chatglm2-e2e")


@pytest.fixture
def base(tokenizer) -> GlmForCausalLM:
    torch.manual_seed(0)
    shape = EmbeddedModel(hidden_size=64, num_layers=2, ffn_hidden_size=96)
    model = embedded.new_model(shape, tokenizer).eval()
    model.lm_head.weight.data.mul_(20)  # a trained head tells tokens apart; an untrained one caps what a LoRA can learn
    return model
