"""PPO on one frozen base (Schulman et al. 2017; the RLHF form of Ziegler et al. 2019 and Ouyang et al. 2022).

The base is in memory once. Four things share it by switching its LoRA adapters:

    policy      adapter "policy", the only one that is trained; starts as a copy of the SFT adapter
    value       a linear head on the policy's last hidden states, starts at zero
    reference   adapter "reference", the SFT adapter, frozen: the KL penalty is taken to it
    reward      adapter "reward" and its head, frozen

Left out here: checkpoints and resume, gradient accumulation, a fast rollout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.config import Evaluate, Ppo
from glm.data.collate import pad, pad_ids
from glm.data.encode import end_id
from glm.errors import InputError
from glm.generation.decode import generate
from glm.models.adapters import last_hidden, load_more_lora, load_score
from glm.training.ppo_terms import (
    adapted_kl_coef,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    k3,
    masked_mean,
    token_rewards,
    whiten,
)
from glm.training.trainer import Log, Progress


class Actors(nn.Module):
    """The one base with the adapters policy, reference and reward, and the heads for value and reward."""

    def __init__(self, base: PreTrainedModel, *, policy: Path, reference: Path, reward: Path) -> None:
        """Load three saved adapters onto `base`; `policy` and `reference` are the same folder when training starts."""
        super().__init__()
        self.model = PeftModel.from_pretrained(base, str(policy), adapter_name="policy", is_trainable=True)
        load_more_lora(self.model, reference, "reference")
        load_more_lora(self.model, reward, "reward")
        self.reward_head = load_score(reward).requires_grad_(False).to(base.device)
        self.value_head = nn.Linear(base.config.hidden_size, 1, bias=False).to(base.device)
        nn.init.zeros_(self.value_head.weight)
        self.use("policy")
        # By name and not by requires_grad: every switch of adapters changes the latter.
        self.trained = [p for name, p in self.model.named_parameters() if ".policy." in name] + [self.value_head.weight]
        self.eval()  # no dropout anywhere, so that the ratio of a fresh rollout is exactly 1

    def use(self, adapter: str) -> None:
        """Make one adapter the active one, or none ("base"); only the policy's parameters ever require a gradient."""
        if adapter == "base":
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".policy." in name and adapter == "policy")

    def score(self, sequences: list[list[int]], pad_id: int) -> torch.Tensor:
        """Reward of each prompt + answer [n], read at its last token."""
        self.use("reward")
        batch = _on(self.model, pad_ids(sequences, pad_id, "right"))
        hidden = last_hidden(self.model, **batch)
        last = batch["attention_mask"].sum(-1) - 1
        rewards = self.reward_head(hidden[torch.arange(len(last)), last].float()).squeeze(-1)
        self.use("policy")
        return rewards

    def forward(self, adapter: str, batch: "Rollout") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answers' tokens, values before each, and entropies: each [n, longest answer]."""
        self.use(adapter)
        hidden = last_hidden(self.model, batch.input_ids, batch.attention_mask)
        hidden = hidden.gather(
            1, batch.where[..., None].expand(-1, -1, hidden.shape[-1])
        )  # states that predict answers
        logits = self.model.get_output_embeddings()(hidden).float() / batch.temperature
        log_probabilities = logits.log_softmax(-1)
        chosen = log_probabilities.gather(-1, batch.answers[..., None]).squeeze(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        values = self.value_head(hidden.float()).squeeze(-1)
        self.use("policy")
        return chosen * batch.mask, values * batch.mask, entropy * batch.mask


@dataclass
class Rollout:
    """A batch of answers. Shapes: n sequences, t tokens of the longest sequence, a tokens of the longest answer."""

    input_ids: torch.Tensor  # [n, t] prompt + answer, right-padded
    attention_mask: torch.Tensor  # [n, t]
    answers: torch.Tensor  # [n, a] the answers' tokens
    where: torch.Tensor  # [n, a] the position whose hidden state predicts each answer token
    mask: torch.Tensor  # [n, a] 1.0 on answer tokens
    temperature: float

    def rows(self, chosen: torch.Tensor) -> "Rollout":
        """The sequences at the indices `chosen`."""
        return Rollout(
            self.input_ids[chosen],
            self.attention_mask[chosen],
            self.answers[chosen],
            self.where[chosen],
            self.mask[chosen],
            self.temperature,
        )


def train(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    dev_prompts: list[list[int]],
    params: Ppo,
    *,
    seed: int,
    log: Log,
    progress: Progress,
) -> dict[str, float]:
    """Train the policy adapter and the value head in place.

    Every step logs: reward mean and spread, KL to the reference in nats a response (k1 and k3 estimates), its
    coefficient, entropy, clip fraction, policy and value loss, explained variance of the value, response length, share
    of responses cut at max_new_tokens, repetition. Every `eval_steps` the same is measured on `dev_prompts` (as
    eval_reward, eval_kl, …). Returns reward, KL, length before and after on `dev_prompts`.

    Raises:
        InputError: fewer prompts than one batch.
        FloatingPointError: loss or gradient became NaN or infinite.
    """
    if len(prompts) < params.batch_size:
        raise InputError(f"ppo.batch_size {params.batch_size} is more than the {len(prompts)} training prompts")
    optimizer = torch.optim.AdamW(actors.trained, lr=params.learning_rate, weight_decay=0.0)
    order = _endless(len(prompts), params.batch_size, seed)
    kl_coef = params.kl_coef
    before = evaluate(actors, tokenizer, dev_prompts, params, seed=seed)
    log(0, {f"eval_{name}": value for name, value in before.items()})
    after, step = before, 0
    for step in range(1, params.max_steps + 1):
        # 1. Roll out: answers by the policy, then everything that is held fixed while it is updated.
        batch_prompts = [prompts[index] for index in next(order)]
        answers = sample(actors, tokenizer, batch_prompts, params, "policy")
        rollout = pack(batch_prompts, answers, tokenizer.pad_token_id, params.temperature, actors.model.device)
        with torch.no_grad():
            scores = actors.score([p + a for p, a in zip(batch_prompts, answers, strict=True)], tokenizer.pad_token_id)
            cut = torch.tensor([answer[-1] != end_id(tokenizer) for answer in answers], device=scores.device)
            old_logprobs, old_values, entropy = actors("policy", rollout)
            reference_logprobs, _, _ = actors("reference", rollout)
            rewards = token_rewards(
                scores - params.missing_eos_penalty * cut, old_logprobs, reference_logprobs, rollout.mask, kl_coef
            )
            advantages, returns = gae(rewards, old_values, rollout.mask, params.gamma, params.lam)
            advantages = whiten(advantages, rollout.mask)
        kl = ((old_logprobs - reference_logprobs) * rollout.mask).sum(-1)

        # 2. Update: several passes over the rollout in minibatches.
        losses = []
        for _ in range(params.ppo_epochs):
            for chosen in torch.randperm(len(answers)).split(params.mini_batch_size):
                part = rollout.rows(chosen.to(rollout.mask.device))
                logprobs, values, _ = actors("policy", part)
                policy_loss, clipped = clipped_policy_loss(
                    logprobs, old_logprobs[chosen], advantages[chosen], part.mask, params.cliprange
                )
                value_loss = clipped_value_loss(
                    values, old_values[chosen], returns[chosen], part.mask, params.cliprange_value
                )
                loss = policy_loss + params.vf_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(actors.trained, params.max_grad_norm)
                if not torch.isfinite(norm):
                    raise FloatingPointError(f"PPO step {step}: loss {loss.item()}, gradient norm {norm.item()}")
                optimizer.step()
                losses.append(torch.stack([policy_loss.detach(), value_loss.detach(), clipped, norm]))

        # 3. Report, adapt the KL coefficient, look at the dev prompts.
        policy_loss, value_loss, clip_fraction, norm = torch.stack(losses).mean(0).tolist()
        values_now = {
            "reward": scores.mean().item(),
            "reward_std": scores.std().item(),
            "kl": kl.mean().item(),
            "kl_k3": k3(old_logprobs, reference_logprobs, rollout.mask).mean().item(),
            "kl_coef": kl_coef,
            "entropy": masked_mean(entropy, rollout.mask).item(),
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": clip_fraction,
            "explained_variance": explained_variance(old_values, returns, rollout.mask),
            "grad_norm": norm,
            "response_length": rollout.mask.sum(-1).mean().item(),
            "truncated": cut.float().mean().item(),
            "repetition": repetition(answers),
        }
        if params.kl_target is not None:
            kl_coef = adapted_kl_coef(kl_coef, values_now["kl"], params.kl_target, params.kl_horizon, len(answers))
        runaway = values_now["kl"] > params.kl_stop
        if step % params.eval_steps == 0 or step == params.max_steps or runaway:
            after = evaluate(actors, tokenizer, dev_prompts, params, seed=seed)
            values_now |= {f"eval_{name}": value for name, value in after.items()}
        log(step, values_now)
        progress(step, params.max_steps)
        if runaway:
            break
    return {
        "steps": step,
        "stopped_on_kl": float(step < params.max_steps),
        **{f"{name}_before": value for name, value in before.items()},
        **after,
    }


def sample(
    actors: Actors, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], params: Ppo | Evaluate, adapter: str
) -> list[list[int]]:
    """One answer to each prompt, drawn from the whole distribution of the model under `adapter`."""
    actors.use(adapter)
    return generate(
        actors.model,
        tokenizer,
        prompts,
        max_new_tokens=params.max_new_tokens,
        batch_size=params.batch_size,
        do_sample=True,
        temperature=params.temperature,
    )


@torch.no_grad()
def evaluate(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    params: Ppo | Evaluate,
    *,
    seed: int,
    adapter: str = "policy",
) -> dict[str, float]:
    """What sampled answers to held-out prompts are like, always drawn with the same random numbers.

    `reward` and its `reward_std` over the answers, `kl` (nats an answer from the adapter "reference", k1), `truncated`
    (share that did not end within max_new_tokens), `response_length` in tokens, `repetition`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = sample(actors, tokenizer, prompts, params, adapter)
    rewards, kls = [], []
    for start in range(0, len(prompts), params.batch_size):
        part = slice(start, start + params.batch_size)
        rollout = pack(prompts[part], answers[part], tokenizer.pad_token_id, params.temperature, actors.model.device)
        sequences = [p + a for p, a in zip(prompts[part], answers[part], strict=True)]
        rewards.append(actors.score(sequences, tokenizer.pad_token_id))
        kls.append((actors(adapter, rollout)[0] - actors("reference", rollout)[0]).sum(-1))
    end = end_id(tokenizer)
    return {
        "reward": torch.cat(rewards).mean().item(),
        "reward_std": torch.cat(rewards).std().item(),
        "kl": torch.cat(kls).mean().item(),
        "response_length": sum(map(len, answers)) / len(answers),
        "truncated": sum(answer[-1] != end for answer in answers) / len(answers),
        "repetition": repetition(answers),
    }


def pack(
    prompts: list[list[int]], answers: list[list[int]], pad_id: int, temperature: float, device: torch.device
) -> Rollout:
    """Put prompts and their answers side by side in right-padded tensors."""
    sequences = pad_ids([p + a for p, a in zip(prompts, answers, strict=True)], pad_id, "right")
    where = [[len(p) - 1 + offset for offset in range(len(a))] for p, a in zip(prompts, answers, strict=True)]
    return Rollout(
        sequences["input_ids"].to(device),
        sequences["attention_mask"].to(device),
        pad(answers, pad_id, "right").to(device),
        pad(where, 0, "right").to(device),
        pad([[1] * len(a) for a in answers], 0, "right").float().to(device),
        temperature,
    )


def repetition(answers: list[list[int]]) -> float:
    """Share of an answer's token pairs that the same answer had before, averaged over answers."""
    shares = []
    for answer in answers:
        bigrams = list(pairwise(answer))
        shares.append(1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0)
    return sum(shares) / len(shares)


def _endless(size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices, each epoch in a new order, the incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(size, generator=generator).tolist()
        yield from (order[start : start + batch_size] for start in range(0, size - batch_size + 1, batch_size))


def _on(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(model.device) for key, value in batch.items()}
