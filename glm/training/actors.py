"""The four actors of PPO on one frozen base, told apart by the LoRA adapter that is switched on.

    policy      adapter "policy", the only one that is trained; starts as a copy of the SFT adapter
    value       a linear head on the policy's last hidden states, starts at zero
    reference   adapter "reference", the SFT adapter, frozen: the KL penalty is taken to it
    reward      adapter "reward" and its head, frozen

"base" stands for no adapter at all. The reward may come from outside instead (`glm.training.external_reward`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.data.collate import pad, pad_ids
from glm.generation import decode_step
from glm.generation.decode import generate
from glm.generation.rollout import Decoder, Samples
from glm.models.adapters import last_hidden, load_more_lora, load_score
from glm.models.chatglm1 import ChatGLMForCausalLM

FORWARD_TOKENS = 16384  # padded tokens of one forward pass without gradients
LOGITS_AT_ONCE = 2**24  # float32 logits held at a time: 64 MiB


class Sampling(Protocol):
    """The parameters by which answers are drawn: a section of params.yaml."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def temperature(self) -> float: ...


@dataclass
class Batch:
    """Prompts with their answers. Shapes: n sequences, t tokens of the longest, a tokens of the longest answer."""

    input_ids: Tensor  # [n, t] prompt + answer, right-padded
    attention_mask: Tensor  # [n, t]
    answers: Tensor  # [n, a] the answers' tokens
    where: Tensor  # [n, a] the position whose hidden state predicts each answer token
    mask: Tensor  # [n, a] 1.0 on answer tokens

    def rows(self, chosen: Tensor | slice) -> "Batch":
        """The sequences at the indices `chosen`."""
        return Batch(
            self.input_ids[chosen],
            self.attention_mask[chosen],
            self.answers[chosen],
            self.where[chosen],
            self.mask[chosen],
        )

    def texts(self) -> tuple[list[list[int]], list[list[int]]]:
        """The prompts and the answers as lists of token ids."""
        starts, lengths = (self.where[:, 0] + 1).tolist(), self.mask.sum(-1).long().tolist()
        prompts = [ids[:start] for ids, start in zip(self.input_ids.tolist(), starts, strict=True)]
        answers = [ids[:length] for ids, length in zip(self.answers.tolist(), lengths, strict=True)]
        return prompts, answers

    def parts(self) -> list["Batch"]:
        """The sequences in forward passes of at most FORWARD_TOKENS."""
        size = max(1, FORWARD_TOKENS // self.input_ids.shape[1])
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.input_ids), size)]


def pack(prompts: list[list[int]], answers: list[list[int]], pad_id: int, device: torch.device) -> Batch:
    """Put prompts and their answers one after the other into right-padded tensors."""
    sequences = pad_ids([p + a for p, a in zip(prompts, answers, strict=True)], pad_id, "right")
    where = [[len(p) - 1 + offset for offset in range(len(a))] for p, a in zip(prompts, answers, strict=True)]
    return Batch(
        sequences["input_ids"].to(device),
        sequences["attention_mask"].to(device),
        pad(answers, pad_id, "right").to(device),
        pad(where, 0, "right").to(device),
        pad([[1] * len(a) for a in answers], 0, "right").float().to(device),
    )


class Actors(nn.Module):
    """The base with the adapters policy, reference and reward, and the heads for value and reward."""

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        policy: Path,
        reference: Path,
        reward: Path,
        scorer: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        """Load three saved adapters onto `base`; `policy` and `reference` are the same folder when training starts.

        A `scorer` gives rewards [n] in place of the adapter `reward`.
        """
        super().__init__()
        self.model = PeftModel.from_pretrained(base, str(policy), adapter_name="policy", is_trainable=True)
        load_more_lora(self.model, reference, "reference")
        load_more_lora(self.model, reward, "reward")
        self.reward_head = load_score(reward).requires_grad_(False).to(base.device)
        self.judge_head: nn.Linear | None = None
        self.scorer = scorer
        self.value_head = nn.Linear(base.config.hidden_size, 1, bias=False).to(base.device)
        nn.init.zeros_(self.value_head.weight)
        self.active = ""
        self.use("policy")
        # By name and not by requires_grad: every switch of adapters changes the latter.
        self.policy = {name: p for name, p in self.model.named_parameters() if self.is_policy(name)}
        self.trained = [*self.policy.values(), self.value_head.weight]
        self.eval()  # no dropout anywhere, so that the ratio of a fresh rollout is 1
        self.decoder = Decoder(self.model) if decode_step.supports(base) else None
        if base.device.type == "cuda" and self.decoder is not None:
            torch._dynamo.config.recompile_limit = 32  # adapters, with and without gradient, fixed and moving shapes
            for layer in base.base_model.layers:
                layer.compile()  # fuses norms, rotation and activation; one compilation serves all layers

    def add_judge(self, folder: Path) -> None:
        """Load a second reward model, for `judge_score`."""
        load_more_lora(self.model, folder, "judge")
        self.judge_head = load_score(folder).requires_grad_(False).to(self.model.device)

    def use(self, adapter: str) -> None:
        """Make one adapter the active one, or none ("base"); only the policy's parameters ever require a gradient."""
        if adapter == self.active:
            return  # a switch walks through all modules
        self.active = adapter
        if adapter == "base":
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.is_policy(name) and adapter == "policy")

    @staticmethod
    def is_policy(name: str) -> bool:
        """Whether a parameter of this name is one of the policy adapter's."""
        return ".policy." in name

    def sample(
        self,
        prompts: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        params: Sampling,
        adapter: str = "policy",
    ) -> Samples:
        """One answer to each prompt, drawn from the whole distribution of the model under `adapter`."""
        self.use(adapter)
        if self.decoder is not None:
            samples = self.decoder.sample(
                prompts,
                tokenizer,
                max_new_tokens=params.max_new_tokens,
                batch_size=params.batch_size,
                do_sample=True,
                temperature=params.temperature,
                value_head=self.value_head,
            )
        else:
            answers = generate(
                self.model,
                tokenizer,
                prompts,
                max_new_tokens=params.max_new_tokens,
                batch_size=params.batch_size,
                do_sample=True,
                temperature=params.temperature,
            )
            batch = pack(prompts, answers, tokenizer.pad_token_id, self.model.device)
            with torch.no_grad():
                logprobs, values, _ = self(adapter, batch, params.temperature)
            samples = Samples(answers, logprobs, values)
        return samples

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Reward of each prompt + answer [n], read at its last token, or as the `scorer` says."""
        if self.scorer is not None:
            return self.scorer(batch).to(self.model.device)
        return self._score(batch, "reward", self.reward_head)

    @torch.no_grad()
    def judge_score(self, batch: Batch) -> Tensor:
        """What the second reward model, added by `add_judge`, thinks of each prompt + answer [n]."""
        assert self.judge_head is not None
        return self._score(batch, "judge", self.judge_head)

    def _score(self, batch: Batch, adapter: str, head: nn.Linear) -> Tensor:
        self.use(adapter)
        last = []
        for part in batch.parts():
            ends = part.attention_mask.sum(-1) - 1
            last.append(self._hidden(part)[torch.arange(len(ends), device=ends.device), ends])
        return head(torch.cat(last).float()).squeeze(-1)

    @torch.no_grad()
    def logprobs(self, adapter: str, batch: Batch, temperature: float) -> Tensor:
        """Log-probabilities of the answers' tokens under `adapter`, without gradients: [n, a]."""
        return torch.cat([self(adapter, part, temperature)[0] for part in batch.parts()])

    def forward(
        self, adapter: str, batch: Batch, temperature: float, *, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the answers' tokens, values before each, and entropies: each [n, a], 0 on padding."""
        self.use(adapter)
        hidden = self._hidden(batch)
        states = hidden.gather(1, batch.where[..., None].expand(-1, -1, hidden.shape[-1]))  # these predict answers
        head = self.model.get_output_embeddings()
        chosen, entropy = token_logprobs(
            states.flatten(0, 1), head, batch.answers.flatten(), temperature, entropy_grad=entropy_grad
        )
        values = self.value_head(states.float()).squeeze(-1)
        return chosen.view_as(values) * batch.mask, values * batch.mask, entropy.view_as(values) * batch.mask

    def _hidden(self, batch: Batch) -> Tensor:
        # A causal model never looks at padding on the right, and without a mask attention takes its fastest kernel.
        # ChatGLM-6B is not causal within the prompt.
        prefix_lm = isinstance(self.model.get_base_model(), ChatGLMForCausalLM)
        return last_hidden(self.model, batch.input_ids, batch.attention_mask if prefix_lm else None)


def token_logprobs(
    hidden: Tensor, head: nn.Module, tokens: Tensor, temperature: float, *, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token [m] after the hidden states [m, hidden], and the distributions' entropies.

    The logits are made a few at a time, and once more for the gradient, so that [m, vocabulary] never exists. Entropies
    carry a gradient only if asked to.
    """

    def some(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float() / temperature
        normalizer = logits.logsumexp(-1)
        chosen = logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropy = normalizer - ((logits - normalizer[:, None]).exp() * logits).sum(-1)
        return chosen, entropy

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(tokens) <= size:
        return some(hidden, tokens)
    pairs = zip(hidden.split(size), tokens.split(size), strict=True)
    parts = [checkpoint(some, states, ids, use_reentrant=False) for states, ids in pairs]
    chosen, entropies = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(entropies)
