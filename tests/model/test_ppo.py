"""PPO on a tiny random Glm whose reward model likes answers that end in one half of the vocabulary.

It learns, it resumes after a kill bit for bit, and it touches nothing but the policy and the value head.
"""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GlmConfig, GlmForCausalLM

from glm.config import Ppo, Sft
from glm.errors import InputError
from glm.generation.decode_step import supports
from glm.models import load_model, load_tokenizer
from glm.models.adapters import add_lora, save_lora, save_score
from glm.training import ppo
from glm.training.actors import Actors
from glm.training.batch import batch_of
from glm.training.checkpoint import Checkpoints, rng_state, set_rng_state
from glm.training.policy_eval import Judged, with_distribution
from glm.training.ppo_terms import ScoreScale
from glm.training.token_logprobs import token_logprobs

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOKENIZER = load_tokenizer(GOLDEN / "tokenizer-chatglm2-tiny")  # only its end and padding tokens count here
PARAMS = Ppo(
    learning_rate=3e-3,
    max_steps=6,
    batch_size=16,
    mini_batch_size=8,
    max_new_tokens=12,
    kl_coef=0.02,
    kl_target=None,
    kl_stop=1000.0,
    eval_steps=3,
    save_steps=2,
    missing_eos_penalty=0.0,
)


def make_base() -> GlmForCausalLM:
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        initializer_range=0.1,
    )
    model = GlmForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = torch.where(torch.arange(61) < 31, 1.0, -1.0)
    return model


def make_actors(folder: Path, base=None, rollout=None) -> Actors:
    """Actors of adapters that are written into `folder`, unless they are there: several processes may read them."""
    base = base or make_base()
    for number, name in enumerate(("sft", "reward")):
        if (folder / name).exists():
            continue
        (folder / name).mkdir(parents=True)
        torch.manual_seed(number)
        adapted = add_lora(base, Sft(lora_rank=4, lora_dropout=0.0))
        for key, parameter in adapted.named_parameters():
            if ".lora_B." in key:
                nn.init.normal_(parameter, std=0.02)
        save_lora(adapted, folder / name, "tiny")
        base = adapted.unload()
        if name == "reward":
            head = nn.Linear(base.config.hidden_size, 1, bias=False)
            nn.init.zeros_(head.weight)
            head.weight.data[0, 0] = 1.0  # where the halves differ
            save_score(folder / "reward", head)
    return Actors(base, policy=folder / "sft", reference=folder / "sft", reward=folder / "reward", rollout=rollout)


def prompts(number: int, vocab: int = 61) -> list[list[int]]:
    draw = torch.Generator().manual_seed(number)
    return [torch.randint(3, vocab, (2 + index % 9,), generator=draw).tolist() for index in range(number)]


def train(actors: Actors, params: Ppo, **options) -> tuple[dict[str, float], list[tuple[int, dict[str, float]]]]:
    curves: list[tuple[int, dict[str, float]]] = []
    torch.manual_seed(11)
    numbers = ppo.train(
        actors,
        TOKENIZER,
        prompts(40),
        prompts(24),
        params,
        seed=5,
        log=lambda step, values: curves.append((step, values)),
        progress=lambda done, total: None,
        **options,
    )
    return numbers, curves


def state_of(actors: Actors) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in actors.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_held_out_reward_rises(tmp_path) -> None:
    numbers, curves = train(make_actors(tmp_path), PARAMS.model_copy(update={"max_steps": 25, "eval_steps": 25}))
    assert numbers["reward"] > numbers["reward_before"] + 0.5 * numbers["reward_std_before"]
    assert numbers["kl"] > 1 and numbers["kl_before"] == pytest.approx(0, abs=1e-3)
    assert [step for step, _ in curves] == list(range(26))
    assert curves[1][1]["approx_kl"] > 0
    last = curves[-1][1]
    assert all(last[name] <= last[then] for name, then in (("reward_p10", "reward_p50"), ("reward_p50", "reward_p90")))


def test_only_policy_and_value_head_change(tmp_path) -> None:
    actors = make_actors(tmp_path)
    before = state_of(actors)
    train(actors, PARAMS.model_copy(update={"max_steps": 2}))
    after = state_of(actors)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    may_change = {name for name in before if ".policy." in name or name == "value_head.weight"}
    assert changed == may_change


def test_the_ratio_of_a_fresh_rollout_is_one(tmp_path) -> None:
    actors = make_actors(tmp_path)
    nn.init.normal_(actors.value_head.weight)
    asked = prompts(16)
    torch.manual_seed(1)
    for params in (PARAMS, PARAMS.model_copy(update={"temperature": 0.7})):
        samples = actors.sample(asked, TOKENIZER, params)
        batch = batch_of(asked, samples.answers, actors.model.device)
        with torch.no_grad():
            logprobs, values, _ = actors("policy", batch, params.temperature)
        torch.testing.assert_close((logprobs - samples.logprobs).exp(), torch.ones_like(logprobs), atol=2e-5, rtol=0)
        torch.testing.assert_close(values, samples.values, atol=1e-4, rtol=0)
    _, curves = train(make_actors(tmp_path), PARAMS.model_copy(update={"max_steps": 1, "ppo_epochs": 1}))
    assert curves[1][1]["rollout_gap"] < 1e-5


def test_packed_rows_give_what_padded_ones_give(tmp_path) -> None:
    """Log-probabilities, values, entropies, rewards and gradients, of answers and prompts of several lengths."""
    packing, padding = (make_actors(tmp_path) for _ in range(2))
    padding.pad_rows()
    assert packing.packed and packing.joint and not padding.packed and not padding.joint
    asked, found = prompts(12), []
    answers = [prompt[::-1][: 1 + index % 6] for index, prompt in enumerate(prompts(12))]
    for actors in (packing, padding):
        torch.manual_seed(2)
        nn.init.normal_(actors.value_head.weight)
        batch = batch_of(asked, answers, actors.model.device)
        each = actors("policy", batch, 0.8, entropy_grad=True)
        gradients = torch.autograd.grad(sum((part**2).sum() for part in each), actors.trained)
        found.append([*each, actors.score(batch), actors.logprobs("reference", batch, 1.0), *gradients])
    assert (
        len(packing.parts(batch)) == 1 and len(batch.parts(24, packed=True)) < len(batch.parts(24, packed=False)) < 12
    )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_a_model_without_decoder_goes_through_generate(tmp_path) -> None:
    base = load_model(GOLDEN / "chatglm1-tiny", dtype=torch.float32)
    assert not supports(base)
    actors = make_actors(tmp_path, base)
    assert actors.sampler.decoder is None
    asked = [[*prompt, base.config.gmask_token_id, base.config.bos_token_id] for prompt in prompts(8)]
    samples = actors.sample(asked, TOKENIZER, PARAMS)
    assert samples.logprobs.shape == (8, max(map(len, samples.answers))) and (samples.logprobs <= 0).all()
    assert samples.logprobs[0, 0] < 0


def test_parts_of_a_minibatch_change_nothing(tmp_path) -> None:
    whole, parts = (make_actors(tmp_path) for _ in range(2))
    one = PARAMS.model_copy(update={"max_steps": 1, "mini_batch_size": 16, "entropy_coef": 0.01})
    train(whole, one)
    train(parts, one.model_copy(update={"gradient_accumulation_steps": 5}))
    for name, parameter in parts.policy.items():
        torch.testing.assert_close(parameter, whole.policy[name], atol=2e-5, rtol=0)


def test_log_probabilities_in_parts_are_those_of_a_log_softmax(monkeypatch) -> None:
    monkeypatch.setattr("glm.training.token_logprobs.LOGITS_AT_ONCE", 61 * 4)
    torch.manual_seed(0)
    head, tokens = nn.Linear(8, 61, bias=False), torch.randint(0, 61, (10,))
    one, other = (torch.randn(10, 8, generator=torch.Generator().manual_seed(3), requires_grad=True) for _ in range(2))
    chosen, entropy = token_logprobs(one, head, tokens, 0.5, entropy_grad=True)
    distribution = (head(other) / 0.5).log_softmax(-1)
    wanted = distribution.gather(-1, tokens[:, None]).squeeze(-1), -(distribution.exp() * distribution).sum(-1)
    torch.testing.assert_close((chosen, entropy), wanted)
    (chosen * tokens + entropy).sum().backward()
    (wanted[0] * tokens + wanted[1]).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_scores_are_clipped_and_the_missing_end_is_paid_for(tmp_path) -> None:
    actors = make_actors(tmp_path)
    asked = prompts(64)
    torch.manual_seed(1)
    samples = actors.sample(asked, TOKENIZER, PARAMS)

    def returns_of(**update) -> torch.Tensor:
        params = PARAMS.model_copy(update={"kl_coef": 0.0, "lam": 1.0, **update})
        found = ppo.assess(actors, TOKENIZER, asked, samples, params, params.kl_coef, ScoreScale())
        return found.returns[:, 0]  # gamma = lam = 1: the sum of all rewards

    scores = actors.score(batch_of(asked, samples.answers, actors.model.device))
    cut = torch.tensor([float(answer[-1] != TOKENIZER.eos_token_id) for answer in samples.answers])
    assert 0 < cut.mean() < 1
    torch.testing.assert_close(returns_of(), scores)
    torch.testing.assert_close(returns_of(score_clip=0.2), scores.clamp(-0.2, 0.2))
    torch.testing.assert_close(returns_of(missing_eos_penalty=3.0), scores - 3 * cut)
    normal = (scores - scores.mean()) / scores.std(correction=0)
    torch.testing.assert_close(returns_of(score_norm=True), normal, atol=1e-4, rtol=1e-4)


def test_too_few_prompts_are_refused(tmp_path) -> None:
    actors = make_actors(tmp_path)
    options = {"seed": 1, "log": lambda *_: None, "progress": lambda *_: None}
    with pytest.raises(InputError, match=r"ppo\.batch_size 16 is more than the 4 training prompts"):
        ppo.train(actors, TOKENIZER, prompts(4), prompts(4), PARAMS, **options)
    with pytest.raises(InputError, match=r"data\.dev_ratio"):
        ppo.train(actors, TOKENIZER, prompts(16), [], PARAMS, **options)


def test_a_single_dev_prompt_has_a_spread() -> None:
    judged = Judged([[5, 6, 5, 6, 5]], torch.tensor([2.0]), torch.tensor([0.5]))
    found = with_distribution(judged, TOKENIZER.eos_token_id)
    assert found == {
        "reward": 2.0,
        "reward_std": 0.0,
        "reward_p10": 2.0,
        "reward_p50": 2.0,
        "reward_p90": 2.0,
        "kl": 0.5,
        "response_length": 5.0,
        "truncated": 1.0,
        "repetition": 0.5,  # of the pairs 56 65 56 65
    }


def test_a_runaway_is_stopped(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    numbers, curves = train(make_actors(tmp_path), PARAMS.model_copy(update={"kl_stop": 1e-3, "learning_rate": 0.02}))
    assert numbers["stopped_on_kl"] == 1 and numbers["steps"] < PARAMS.max_steps
    assert curves[-1][1]["kl"] > 1e-3
    assert "more than kl_stop 0.001: lower learning_rate or raise kl_coef" in caplog.text


def run_until_done(folder: Path, pause: float = 0.0) -> None:
    """What the killed process of the next test does; `pause` seconds at step 3 give it time to be killed."""

    def show(step: int, judged: Judged) -> None:
        if step == 3:
            time.sleep(pause)

    actors = make_actors(folder)
    params = PARAMS.model_copy(update={"kl_target": 0.5, "score_norm": True})
    numbers, curves = train(actors, params, checkpoints=Checkpoints(folder / "checkpoints"), show=show)
    torch.save({"actors": state_of(actors), "numbers": numbers, "curves": curves}, folder / "result.pt")


def test_a_training_that_was_killed_ends_as_an_unbroken_one(tmp_path) -> None:
    run_until_done(tmp_path / "unbroken")
    folder = tmp_path / "broken"
    command = (
        f"import tests.model.test_ppo as t; from pathlib import Path; t.run_until_done(Path({str(folder)!r}), 120)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 100
    while not (folder / "checkpoints" / "step-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.pt").exists()
    run_until_done(folder)
    unbroken, broken = (torch.load(tmp_path / name / "result.pt") for name in ("unbroken", "broken"))
    assert same(unbroken["actors"], broken["actors"])
    assert unbroken["numbers"] == broken["numbers"]
    assert unbroken["curves"] == broken["curves"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "here")
    assert checkpoints.latest() is None
    for step in (2, 4, 10):
        checkpoints.save(step, {"step": step, "weights": torch.arange(100), "rng": rng_state()})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-10", "step-4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest()[0] == 10
    newest = checkpoints.folder / "step-10" / "state.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-10: a damaged checkpoint is passed over"):
        step, state = checkpoints.latest()
    assert step == state["step"] == 4 and torch.equal(state["weights"], torch.arange(100))
    newest.unlink()
    with pytest.warns(UserWarning, match="step-10"):
        assert checkpoints.latest()[0] == 4
    checkpoints.clear()
    assert checkpoints.latest() is None


def test_random_numbers_go_on_where_they_were() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first
