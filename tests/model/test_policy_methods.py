"""PPO and DPO by the methods other than LoRA, on the tiny Glm of test_ppo: they resume bit for bit and can be loaded.

What SFT trained is a LoRA (the policy starts fresh on top of it) or of the policy's own method (it starts as a copy).
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from glm.config import Dpo, Method, Sft
from glm.models import load_model, methods
from glm.models.adapters import add_lora
from glm.models.lineage import Lineage, above
from glm.models.saving import save_trained
from glm.models.variants import Variants
from glm.training import dpo, ppo
from glm.training.actors import Actors, NewPolicy
from glm.training.batch import batch_of
from glm.training.checkpoint import Checkpoints
from tests.model.test_ppo import PARAMS, TOKENIZER, make_base, prompts, same
from tests.model.test_rivals import COMMON, rankings

ALGORITHMS = {
    "ppo": (ppo.train, PARAMS.model_copy(update={"max_steps": 5, "score_norm": True}), prompts(40)),
    "dpo": (dpo.train, Dpo(**COMMON, max_steps=5, tokens_per_forward=64), rankings()),
}
SHAPE = Sft(lora_rank=4, lora_dropout=0.0, pre_seq_len=4, num_layer_trainable=1)


def write_models(folder: Path, method: Method) -> None:
    """A base, on it something that SFT could have trained by `method`, and a reward model on the base."""
    make_base().save_pretrained(folder / "base")
    below = Lineage(base=str(folder / "base"), dtype="float32")
    torch.manual_seed(1)
    sft = methods.start(make_base(), method, SHAPE)
    with torch.no_grad():
        for parameter in methods.trained_parameters(sft).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_trained(sft, method, folder / "sft", below, tokenizer=TOKENIZER)
    head = nn.Linear(32, 1, bias=False)
    head.weight.data.zero_()[0, 0] = 1.0  # where the halves of the vocabulary differ
    save_trained(add_lora(make_base(), SHAPE), "lora", folder / "reward", below, score=head)


def train(folder: Path, algorithm: str, method: Method, checkpoints: str, stop_at: int | None = None):
    """Train as the policy step does and write `folder`/policy; a run that stops at a look raises KeyboardInterrupt."""
    start, params, rows = ALGORITHMS[algorithm]
    below, copy_of = above(folder / "sft").starting(method, resume=True)
    policy = NewPolicy(method, SHAPE, below.parts, copy_of)
    actors = Actors(make_base(), policy=policy, reference=folder / "sft", reward=folder / "reward")
    curves: list = []

    def show(step: int, judged) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    torch.manual_seed(11)
    numbers = start(
        actors,
        TOKENIZER,
        rows,
        prompts(8),
        params,
        seed=5,
        log=lambda step, values: curves.append((step, values)),
        progress=lambda done, total: None,
        show=show,
        checkpoints=Checkpoints(folder / checkpoints),
    )
    actors.finish()
    save_trained(
        actors.model, method, folder / "policy", below, name="policy", weights=actors.policy, tokenizer=TOKENIZER
    )
    return actors, numbers, curves


@pytest.mark.parametrize("beneath", ["lora", "the same"])
@pytest.mark.parametrize("method", ["p_tuning", "freeze", "full"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_stopped_training_ends_as_an_unbroken_one(
    algorithm: str, method: Method, beneath: str, tmp_path: Path
) -> None:
    """5 steps with looks after 3 and 5; stopped at the look of step 3, so after the checkpoint of step 2."""
    write_models(tmp_path, method if beneath == "the same" else "lora")
    unbroken, *told = train(tmp_path, algorithm, method, "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, algorithm, method, "broken", stop_at=3)
    broken, *told_again = train(tmp_path, algorithm, method, "broken")
    assert same(unbroken.policy_state(), broken.policy_state()) and told == told_again
    if (method, beneath) != ("p_tuning", "lora"):  # a fresh prefix already changes the answers
        assert told[0]["kl_before"] == pytest.approx(0, abs=1e-3)

    ids = torch.tensor([prompts(9)[8]])
    with torch.no_grad():
        wanted = broken.model(input_ids=ids).logits
        torch.testing.assert_close(load_model(tmp_path / "policy")(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
        broken.use("reference")
        assert not torch.allclose(broken.model(input_ids=ids).logits, wanted, atol=1e-3)
        reference = load_model(tmp_path / "sft")(input_ids=ids).logits
        torch.testing.assert_close(broken.model(input_ids=ids).logits, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "module"), [("lora", "mlp"), ("freeze", "mlp"), ("freeze", "qkv"), ("full", "mlp")])
def test_rollouts_follow_all_that_is_trained(method: Method, module: str, tmp_path: Path) -> None:
    """Weights, biases and norms: the decoder's log-probabilities are those of the policy as it is by now."""
    write_models(tmp_path, "lora" if method == "lora" else "freeze")
    below, copy_of = above(tmp_path / "sft").starting(method, resume=method == "lora")
    policy = NewPolicy(method, SHAPE.model_copy(update={"name_module_trainable": module}), below.parts, copy_of)
    actors = Actors(make_base(), policy=policy, reference=tmp_path / "sft", reward=tmp_path / "reward")
    params = PARAMS.model_copy(update={"temperature": 0.7})
    assert actors.sampler.decoder is not None
    actors.sample(prompts(8), TOKENIZER, params)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in actors.policy.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        samples = actors.sample(prompts(8), TOKENIZER, params)
        batch = batch_of(prompts(8), samples.answers, actors.model.device)
        logprobs, _, _ = actors("policy", batch, params.temperature)
    torch.testing.assert_close(samples.logprobs, logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["lora", "p_tuning", "freeze"])
def test_what_a_policy_started_from_is_told_apart_from_the_bare_base(method: Method, tmp_path: Path) -> None:
    write_models(tmp_path, method)
    variants = Variants(make_base())
    variants.add("sft", tmp_path / "sft")
    variants.add_chain("start", (str(tmp_path / "sft"),))
    variants.add_chain("bare", ())
    ids = torch.tensor([prompts(9)[8]])
    with torch.no_grad():
        logits = {}
        for name in ("bare", "start", "sft", "base"):
            variants.use(name)
            logits[name] = variants.model(input_ids=ids).logits
        wanted = load_model(tmp_path / "base", adapters=[tmp_path / "sft"])(input_ids=ids).logits
    assert torch.equal(logits["start"], logits["sft"]) and torch.equal(logits["bare"], logits["base"])
    torch.testing.assert_close(logits["start"], wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits["start"], logits["base"], atol=1e-3)
