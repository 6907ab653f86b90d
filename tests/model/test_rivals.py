"""PPO's rivals on the tiny Glm of test_ppo: their losses by hand, that they learn, that they resume bit for bit."""

import importlib
from pathlib import Path

import pytest
import torch

from glm import config
from glm.data.encode import IGNORED, encode_row
from glm.errors import InputError
from glm.training import dpo, kto, rloo, rrhf, trl_policy
from glm.training.answer_logprobs import answer_logprobs, ranking_size, reference_logprobs, rows_of
from glm.training.batch import batch_of
from glm.training.checkpoint import Checkpoints
from glm.training.policy_loop import batch_at
from glm.training.raft import best_of
from tests.model.test_packing import adapted, prefix_examples
from tests.model.test_ppo import TOKENIZER, make_actors, prompts, same, state_of

COMMON = {"learning_rate": 3e-3, "batch_size": 4, "max_new_tokens": 8, "save_steps": 2, "eval_steps": 3}
PARAMS = {
    "dpo": config.Dpo(**COMMON, tokens_per_forward=64),
    "rrhf": config.Rrhf(**COMMON, tokens_per_forward=64),
    "kto": config.Kto(**COMMON),
    "raft": config.Raft(**COMMON, num_generations=4),
    "grpo": config.Grpo(**COMMON, num_generations=4, beta=0.01),
    "rloo": config.Rloo(**COMMON, num_generations=4, beta=0.01, gradient_accumulation_steps=2),
}


def rankings(number: int = 12, answers: int = 2) -> list[dict]:
    """Better answers have tokens of the lower half of the vocabulary, the one that the reward model likes."""
    draw = torch.Generator().manual_seed(3)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(3, 8, (), generator=draw))
        return [*torch.randint(low, high, (length,), generator=draw).tolist(), TOKENIZER.eos_token_id]

    ranges = [(3, 31), (31, 61), (46, 61)][:answers]
    return [
        {"sequences": [prompt + tokens(*bounds) for bounds in ranges], "starts": [len(prompt)] * answers}
        for prompt in prompts(number)
    ]


def rows_for(algorithm: str):
    if algorithm == "kto":
        return [row for ranking in rankings() for row in kto.labelled_ranking(ranking)]
    return rankings() if algorithm in ("dpo", "rrhf") else prompts(8)


def train(algorithm: str, folder: Path, max_steps: int, checkpoints: str = "checkpoints", stop_at: int | None = None):
    """Actors, numbers and curves of a run; one that stops at a look raises KeyboardInterrupt there."""
    actors = make_actors(folder)
    curves: list = []

    def show(step: int, judged) -> None:
        if stop_at is not None and step == stop_at:
            raise KeyboardInterrupt

    torch.manual_seed(11)
    numbers = importlib.import_module(f"glm.training.{algorithm}").train(
        actors,
        TOKENIZER,
        rows_for(algorithm),
        prompts(16),
        PARAMS[algorithm].model_copy(update={"max_steps": max_steps}),
        seed=5,
        log=lambda step, values: curves.append((step, values)),
        progress=lambda done, total: None,
        show=show,
        checkpoints=Checkpoints(folder / checkpoints),
    )
    return actors, numbers, curves


@pytest.mark.parametrize("algorithm", PARAMS)
def test_a_training_that_was_stopped_ends_as_an_unbroken_one(algorithm: str, tmp_path: Path) -> None:
    """5 steps with looks after 3 and 5; stopped at the look of step 3, so after the checkpoint of step 2."""
    unbroken = train(algorithm, tmp_path, 5, "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(algorithm, tmp_path, 5, stop_at=3)
    broken = train(algorithm, tmp_path, 5)
    assert same(state_of(unbroken[0]), state_of(broken[0]))
    assert unbroken[1:] == broken[1:]
    assert [step for step, _ in unbroken[2]] == list(range(6))
    assert unbroken[1]["kl_before"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("algorithm", PARAMS)
def test_it_learns_and_only_the_policy_changes(algorithm: str, tmp_path: Path) -> None:
    before = state_of(make_actors(tmp_path))
    actors, numbers, curves = train(algorithm, tmp_path, 12)
    assert numbers["reward"] > numbers["reward_before"] + 0.1 * numbers["reward_std_before"]
    if "margin" in curves[-1][1]:
        assert curves[-1][1]["margin"] > curves[1][1]["margin"]
    after = state_of(actors)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".policy." in name}


def test_dpo_loss_by_hand() -> None:
    # β h = 2 and -1; -log σ(2) = 0.126928, -log σ(-1) = 1.313262
    margins = torch.tensor([2.0, -1.0])
    assert dpo.dpo_loss(margins, config.Dpo()).item() == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-5)
    # ε = 0.1: 0.9 · 0.126928 + 0.1 · 2.126928 and 0.9 · 1.313262 + 0.1 · 0.313262
    smooth = dpo.dpo_loss(margins, config.Dpo(label_smoothing=0.1)).item()
    assert smooth == pytest.approx((0.326928 + 1.213262) / 2, abs=1e-5)
    # β = 0.5: h = 4 and -2, 1/(2β) = 1: (3² + 3²) / 2
    assert dpo.dpo_loss(margins, config.Dpo(loss_type="ipo", beta=0.5)).item() == pytest.approx(9.0)


def test_rrhf_terms_by_hand() -> None:
    # p = -1, -0.5, -2: of three pairs only (1, 2) is in the wrong order, by 0.5
    rank_loss, sft_loss, accuracy = rrhf.rrhf_terms(torch.tensor([-1.0, -0.5, -2.0]))
    assert (rank_loss.item(), sft_loss.item()) == (0.5, 1.0)
    assert accuracy.item() == pytest.approx(2 / 3)


def test_raft_keeps_the_best_of_each_prompt() -> None:
    assert best_of(torch.tensor([0.0, 2.0, 1.0, 5.0, 4.0, -1.0]), 3).tolist() == [1, 3]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_packed_padded_and_reference_log_probabilities_agree(share_prompt: bool, tmp_path: Path) -> None:
    actors = make_actors(tmp_path)
    rows = rankings(answers=3)
    cut = rows[0]["sequences"]
    cut[2] = cut[1][:-1]  # what these two have in common is longer than the prompt
    padding = make_actors(tmp_path)
    padding.pad_rows()
    assert actors.packed and actors.joint and not padding.packed
    packed, lengths = answer_logprobs(actors, "policy", rows, share_prompt=share_prompt)
    padded, _ = answer_logprobs(padding, "policy", rows, share_prompt=share_prompt)
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=0)
    one, other = (
        torch.autograd.grad(sums.sum(), list(those.policy.values()), retain_graph=True)
        for those, sums in ((actors, packed), (padding, padded))
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    wanted = [len(ids) - start for row in rows for ids, start in zip(row["sequences"], row["starts"], strict=True)]
    assert lengths.tolist() == wanted
    # the reference is a copy of the policy here, and its numbers are computed in several forward passes
    size, unshared = (ranking_size(those, share_prompt=share_prompt) for those in (actors, padding))
    assert (sum(map(size, rows)) < sum(map(unshared, rows))) == share_prompt
    assert len(rows_of(rows, size, 64)) > 1
    reference = reference_logprobs(actors, rows, 64, share_prompt=share_prompt)
    torch.testing.assert_close(torch.tensor(reference).flatten(), padded, atol=1e-4, rtol=0)


def test_prefix_lm_rows_are_packed_too(tmp_path: Path) -> None:
    """ChatGLM-6B reads its prompts in both directions, in a packed row as in a padded one."""
    base = adapted("chatglm1", lora_target=["query_key_value"]).unload()
    actors, rows = make_actors(tmp_path, base), prefix_examples(6)
    found = [
        {
            "sequences": [row["input_ids"] for row in pair],
            "starts": [row["labels"].count(IGNORED) for row in pair],
        }
        for pair in (rows[:2], rows[2:4], rows[4:])
    ]
    for ranking in found[1:]:  # two of the three have one prompt
        prompt = ranking["sequences"][0][: ranking["starts"][0]]
        ranking["sequences"][1] = prompt + ranking["sequences"][1][ranking["starts"][1] :]
        ranking["starts"][1] = len(prompt)
    assert actors.packed
    packed, _ = answer_logprobs(actors, "policy", found, share_prompt=True)
    actors.pad_rows()
    padded, _ = answer_logprobs(actors, "policy", found, share_prompt=True)
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=0)


def test_rows_of_a_batch_keep_their_rankings(tmp_path: Path) -> None:
    """Whatever is taken of a batch, what it shares are the prompts of the rankings that are left."""
    actors = make_actors(tmp_path)
    flat = [(ids[:start], ids[start:]) for row in rankings(3, 3) for ids, start in zip(*row.values(), strict=True)]
    asked, answers = map(list, zip(*flat, strict=True))
    batch = batch_of(asked, answers, actors.model.device, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert batch.ranking_sizes() == [3, 3, 3]
    with torch.no_grad():
        whole, _, _ = actors("policy", batch, 1.0)
        for chosen in ([1, 2, 3], [8, 0, 7], [4]):
            part = batch.rows(chosen)
            assert part.ranking_sizes() == {1: [2, 1], 8: [1, 1, 1], 4: [1]}[chosen[0]]
            torch.testing.assert_close(actors("policy", part, 1.0)[0], whole[chosen], atol=1e-4, rtol=0)
    parts = batch.parts(40, packed=True)
    assert len(parts) > 1 and sum(sum(part.ranking_sizes()) for part in parts) == 9


@pytest.mark.parametrize("algorithm", ["dpo", "rrhf", "raft"])
def test_too_few_rows_are_refused_before_anything_is_computed(algorithm: str, tmp_path: Path) -> None:
    def show(step: int, judged) -> None:
        raise AssertionError("the dev prompts were answered")

    params = PARAMS[algorithm].model_copy(update={"batch_size": 13})
    told = {"log": lambda *_: None, "progress": lambda *_: None, "show": show, "seed": 1}
    with pytest.raises(InputError, match=r"batch_size 13 is more than the \d+ training rows"):
        importlib.import_module(f"glm.training.{algorithm}").train(
            make_actors(tmp_path), TOKENIZER, rows_for(algorithm), prompts(4), params, **told
        )


def test_dpo_needs_the_reference_of_what_it_will_see() -> None:
    within = PARAMS["dpo"].model_copy(update={"max_steps": 2})
    assert dpo.indices_needed(12, within, 5) == sorted([*batch_at(1, 12, 4, 5), *batch_at(2, 12, 4, 5)])
    assert dpo.indices_needed(12, within.model_copy(update={"max_steps": 10**9}), 5) == list(range(12))


def test_batches_go_through_all_rows_in_a_new_order_each_epoch() -> None:
    epochs = [[index for step in steps for index in batch_at(step, 10, 3, seed=1)] for steps in ((1, 2, 3), (4, 5, 6))]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert batch_at(5, 10, 3, seed=1) == epochs[1][3:6]


def test_trl_trains_on_our_tokens(tmp_path: Path) -> None:
    """A Chinese ranking and a labelled answer, by our template, are what TRL's loss counts, token for token."""
    prompt = [{"role": "user", "content": "写一条酒店评论"}]
    ranking = encode_row(TOKENIZER, {"prompt": prompt, "answers": ["房间很干净", "又脏又吵"]}, config.Data())
    single = encode_row(TOKENIZER, {"prompt": prompt, "answer": "早餐不错", "label": True}, config.Data())
    rows = [*kto.labelled_ranking(ranking), kto.labelled_answer(single)]
    assert [row["label"] for row in rows] == [True, False, True]
    actors = make_actors(tmp_path)
    params = PARAMS["kto"].model_copy(update={"batch_size": 3})
    trainer = trl_policy.prepare(
        actors, lambda folder: kto.make(actors, TOKENIZER, rows, params, folder, seed=1), tmp_path / "out"
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    for place, ids in enumerate([*ranking["sequences"], single["input_ids"]]):
        assert batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist() == ids
        learned = batch["input_ids"][place][batch["completion_mask"][place].bool()].tolist()
        assert learned == ids[len(rows[place]["prompt_ids"]) :]
        assert TOKENIZER.decode(learned[:-1]).strip() == ["房间很干净", "又脏又吵", "早餐不错"][place]
        assert learned[-1] == TOKENIZER.eos_token_id
    # the KL term's answers are those of the batch, each to another prompt's place
    wrong = batch["KL_input_ids"][0][batch["KL_completion_mask"][0].bool()].tolist()
    assert wrong == rows[2]["completion_ids"]


def test_trl_counts_the_same_log_probabilities(tmp_path: Path) -> None:
    """RLOO's old log-probabilities of our rollouts are those of our decoder, and its rewards those of our scorer."""
    actors = make_actors(tmp_path)
    trainer = trl_policy.prepare(
        actors, lambda folder: rloo.make(actors, TOKENIZER, prompts(8), PARAMS["rloo"], folder, seed=1), tmp_path
    )
    drawn: list = []
    sample = actors.sample
    actors.sample = lambda *args: drawn.append((args[0], sample(*args))) or drawn[-1][1]
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts(8)])
    asked, samples = drawn[0]
    torch.testing.assert_close(inputs["old_logps"], samples.logprobs.sum(-1), atol=1e-3, rtol=0)
    scores = actors.score(batch_of(asked, samples.answers, actors.model.device))
    grouped = scores.view(2, 4)  # the policy is still the reference: no KL in the rewards
    wanted = grouped - (grouped.sum(1, keepdim=True) - grouped) / 3
    torch.testing.assert_close(inputs["advantages"], wanted.flatten(), atol=1e-3, rtol=0)


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    for step, files in ((5, (trl_policy.POLICY, trl_policy.STATE)), (10, (trl_policy.POLICY,))):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    assert trl_policy.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert trl_policy.last_checkpoint(tmp_path / "none") is None
