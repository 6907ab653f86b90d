"""Answers that share the computation of their prompt: the numbers of the run in which each has it to itself."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from glm.config import Reward, Sft
from glm.models.packed_attention import VARLEN, _Copied, attention_of
from glm.training import reward
from glm.training.layers import MODES, _keep_narrow, layers_run, memory_estimate
from glm.training.packing import Packing, own_lengths, packed_row
from glm.training.plan import plan
from glm.training.reward import RankingCollator, RewardLoss, RewardModel
from tests.model.test_packing import adapted, assert_same, step_loss

PACKING = Packing(tokens_per_row=130, multiple=16, max_sequences=10, max_length=60)
SHARED = replace(PACKING, max_answers=4)


def rankings(name: str = "glm", sizes: tuple[int, ...] = (2, 3, 4, 2, 2)) -> list[dict[str, list[list[int]]]]:
    """Prompts of 3 to 30 tokens, each with so many answers of 1 to 12; ChatGLM-6B's end with [gMASK] <sop>."""
    rng = random.Random(5)
    found = []
    for size in sizes:
        prompt = [rng.randrange(1, 200) for _ in range(rng.randrange(3, 31))]
        prompt += [201, 204] if name == "chatglm1" else []
        answers = [[rng.randrange(1, 200) for _ in range(rng.randrange(1, 13))] for _ in range(size)]
        found.append({"sequences": [[*prompt, *answer] for answer in answers]})
    cut = found[1]["sequences"]
    cut[2] = cut[1][:-1] if len(cut[1]) - 1 > len(cut[0]) else [*cut[1], 7]  # one answer is how another begins
    if name != "chatglm1":
        found[-1]["sequences"][1] = [199, *found[-1]["sequences"][1]]  # and here nothing is in common
    return found


def reward_loss(name: str, *, fused: bool = False) -> RewardLoss:
    options = {"lora_target": ["query_key_value", "dense_h_to_4h"]} if name == "chatglm1" else {}
    model = adapted(name, **options)
    torch.manual_seed(2)
    return RewardLoss(RewardModel(model, torch.nn.Linear(32, 1, bias=False)), Reward(), fused=fused)


def packing_of(module: RewardLoss, packing: Packing) -> Packing:
    config = module.model.backbone.get_base_model().config
    return replace(packing, prefix_lm=config) if config.model_type == "chatglm" else packing


@pytest.mark.parametrize("name", ["glm", "qwen2", "chatglm1"])
def test_loss_and_gradients_are_those_of_unshared_and_of_padded_rows(name: str) -> None:
    module, items = reward_loss(name), rankings(name)
    padded, unshared, shared = (
        RankingCollator(3, packing and packing_of(module, packing), 2)(items) for packing in (None, PACKING, SHARED)
    )
    assert shared["tokens"] < 0.75 * unshared["tokens"] and unshared["tokens"] == padded["tokens"]
    assert 1 < len(shared["micro_batches"]) < len(unshared["micro_batches"])
    assert all(part["input_ids"].numel() % 16 == 0 for part in shared["micro_batches"])
    wanted = step_loss(module, padded)
    with attention_of(module.model.backbone.get_base_model(), VARLEN):
        for batch in (unshared, shared):
            assert_same(step_loss(module, batch), wanted)


@pytest.mark.parametrize("name", ["glm", "chatglm1"])
def test_scores_are_those_of_each_answer_alone(name: str) -> None:
    module, items = reward_loss(name), rankings(name)
    sequences = [sequence for each in items for sequence in each["sequences"]]
    wanted = reward.scores_of(module.model, sequences, 3, batch_size=1)
    row = RankingCollator(3, packing_of(module, replace(SHARED, tokens_per_row=999)), 1)(items)["micro_batches"]
    assert len(row) == 1
    inputs = {key: value for key, value in row[0].items() if key != "sizes"}
    with torch.no_grad(), attention_of(module.model.backbone.get_base_model(), VARLEN):
        found = module.model(**inputs)
    order = sorted(range(len(items)), key=lambda index: sum(own_lengths(items[index]["sequences"], None)), reverse=True)
    by_ranking = wanted.split([len(each["sequences"]) for each in items])
    torch.testing.assert_close(found, torch.cat([by_ranking[index] for index in order]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["glm", "chatglm1"])
def test_an_answer_sees_its_prompt_and_no_sibling(name: str) -> None:
    module = reward_loss(name)
    collate = RankingCollator(3, packing_of(module, SHARED), 1)
    prompt = [5, 6, 7, 8, *([201, 204] if name == "chatglm1" else [])]
    answers = [[9, 10, 11], [12, 13], [14, 15, 16, 17]]

    def scores(prompt: list[int], answers: list[list[int]]) -> torch.Tensor:
        (part,) = collate([{"sequences": [[*prompt, *answer] for answer in answers]}])["micro_batches"]
        part.pop("sizes")
        with torch.no_grad(), attention_of(module.model.backbone.get_base_model(), VARLEN):
            return module.model(**part)

    before = scores(prompt, answers)
    for index in range(3):
        changed = [[*answer] for answer in answers]
        changed[index][0] += 20
        same = scores(prompt, changed) == before
        assert same.tolist() == [other != index for other in range(3)]
    assert not (scores([99, *prompt[1:]], answers) == before).any()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_and_fused_layers_take_shared_rows(mode: str, fused: bool) -> None:
    plain, module = reward_loss("glm"), reward_loss("glm", fused=fused)
    items = rankings()
    wanted = step_loss(plain, RankingCollator(0, None, 9)(items))
    base = module.model.backbone.get_base_model()
    with attention_of(base, VARLEN), layers_run(base, compiled=False, checkpointing=mode, fused=fused):
        loss, gradients = step_loss(module, RankingCollator(0, SHARED, 9)(items))
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    for (key, gradient), expected in zip(gradients.items(), wanted[1].values(), strict=True):
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max(), key


@pytest.mark.parametrize("count", [2, 3])
def test_copied_keys_are_one_graph_and_have_the_gradients_of_indexing(count: int) -> None:
    torch._dynamo.reset()

    def layer(states: torch.Tensor, sources: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        run = lambda states: (2 * _Copied.apply(states, sources, copies)).sin()  # noqa: E731
        return checkpoint(run, states, use_reentrant=False, context_fn=_keep_narrow)

    # aot_eager traces and differentiates as on a GPU, without the code generation that takes a compiler and a minute
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for prompt in (5, 9, 12):
        sequences = [[1] * prompt + [2 + number] * (number + 1) for number in range(count)]
        row = packed_row(sequences, replace(SHARED, max_answers=count), 0, [count])
        states = torch.randn(1, 2, row["input_ids"].shape[1], 4, dtype=torch.float64, requires_grad=True)
        (2 * states[:, :, row["key_sources"]]).sin().square().sum().backward()
        wanted, states.grad = states.grad, None
        compiled(states, row["key_sources"], row["key_copies"]).square().sum().backward()
        torch.testing.assert_close(states.grad, wanted)


def test_a_shared_row() -> None:
    sequences = [[1, 2, 3, 4], [1, 2, 5, 6, 7], [8, 9]]
    row = packed_row(sequences, replace(PACKING, max_sequences=3, max_answers=2), 0, [2, 1])
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9] + [0] * 7]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, *range(7)]]
    assert row["cu_seq_lens_q"].tolist() == [0, 4, 7, 9, 16]
    assert row["cu_seq_lens_k"].tolist() == [0, 4, 9, 11, 18]
    assert row["key_sources"].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, *range(9, 16)]
    assert row["key_copies"].tolist() == [[0, 1, 2, 3, *range(6, 18)], [4, 5] + [-1] * 14]


def test_what_is_shared() -> None:
    prefix_lm = SimpleNamespace(bos_token_id=204)
    assert own_lengths([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 5]], None) == [4, 1, 3]
    assert own_lengths([[1, 2, 3], [1, 2, 3]], None) == [3, 1]  # an answer keeps a token of its own, where its score is
    assert own_lengths([[1], [1, 2]], None) == [1, 2]
    assert own_lengths([[1, 201, 204, 4], [1, 201, 204, 5, 6]], prefix_lm) == [4, 2]
    assert own_lengths([[1, 2, 201, 204, 4], [1, 3, 201, 204, 5]], prefix_lm) == [5, 5]


def test_the_plan_counts_what_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="glm")
    model, items = adapted("glm"), rankings(sizes=(2, 3, 2, 2, 2, 4, 2, 2))
    sequences = lambda ranking: ranking["sequences"]  # noqa: E731
    computed = sum(sum(own_lengths(each["sequences"], None)) for each in items)
    whole = sum(len(sequence) for each in items for sequence in each["sequences"])
    options = {"stage": "reward", "seed": 0, "share_prompt": True}

    found = plan(model, items, sequences, Reward(), **options)
    assert found.packing.max_answers == 4 and found.epoch_tokens == computed
    assert f"8 examples of {computed / 8:.0f} tokens" in caplog.text
    assert (
        f"a prompt is computed once for all its answers, which spares {100 * (1 - computed / whole):.0f} %"
        in caplog.text
    )
    assert found.copied_keys == found.row_tokens * (whole - computed) // computed

    rows = plan(model, items, sequences, Reward(tokens_per_step=80, tokens_per_forward=80), **options)
    assert all(sum(sum(own_lengths(each["sequences"], None)) for each in row) <= 80 for row in rows.train_set)
    unshared = plan(model, items, sequences, Reward(tokens_per_step=80, tokens_per_forward=80), stage="reward", seed=0)
    assert len(rows.train_set) < len(unshared.train_set) and unshared.packing.max_answers == 1

    flex = plan(model, items, sequences, Reward(attn_implementation="flex_attention"), **options)
    assert flex.packing.max_answers == 1 and flex.copied_keys == 0 and flex.epoch_tokens == whole
    assert "for each of its answers: attention sdpa cannot share it, varlen can" in caplog.text
    hardly = [{"sequences": [[1, *range(5, 30)], [1, *range(40, 65)]]}]
    assert plan(model, hardly, sequences, Reward(), **options).packing.max_answers == 1
    assert "for each of its answers: sharing it spares under 4 %" in caplog.text
    padded = plan(model, items, sequences, Reward(packing=False), **options)
    assert padded.packing is None and padded.epoch_tokens == whole


def test_copied_keys_are_part_of_the_memory() -> None:
    model = adapted("glm").get_base_model()
    for mode in MODES:
        without, with_copies = (
            memory_estimate(model, 4096, 0, mode, compiled=True, copied_keys=copied) for copied in (0, 1000)
        )
        # keys and values of 3 layers, 2 heads of 8, in float32; what is computed again is not kept
        assert with_copies - without == (1000 * 3 * 2 * 16 * 4 if mode == "none" else 0)


@pytest.mark.parametrize("tokens_per_step", [None, 128])
def test_training_shares_and_changes_nothing(tokens_per_step: int | None) -> None:
    items = rankings(sizes=(2, 3, 2, 2, 2, 4, 2, 2, 3, 2, 2, 2))
    found: dict[bool, list[float]] = {}
    seen: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for share in (True, False):
        params = Reward(
            share_prompt=share, tokens_per_step=tokens_per_step, tokens_per_forward=128, max_steps=3, logging_steps=1,
            per_device_train_batch_size=4, learning_rate=1e-2, eval_steps=2,
        )  # fmt: skip
        points: dict[int, dict[str, float]] = {}
        _, numbers = reward.train(
            adapted("glm").get_base_model(), SimpleNamespace(pad_token_id=0), items, items, params,
            shape=Sft(lora_rank=4, lora_dropout=0.0), seed=0, progress=lambda done, total: None,
            log=lambda step, values, to=points: to.setdefault(step, {}).update(values),
            log_speed=lambda step, values, to=seen[share]: to.append(values),
        )  # fmt: skip
        found[share] = [points[step]["loss"] for step in (1, 2, 3)] + [points[2]["eval_loss"], numbers["pairwise_loss"]]
    assert found[True][2] != pytest.approx(found[True][0], abs=1e-3)  # it does learn
    if tokens_per_step is None:
        assert found[True] == pytest.approx(found[False], abs=1e-5)
    tokens = {
        share: speeds[-1]["tokens_per_second"] / speeds[-1]["examples_per_second"] for share, speeds in seen.items()
    }
    assert tokens[True] < tokens[False]  # tokens of a ranking
