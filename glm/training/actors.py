"""The four actors of PPO on one base in memory, told apart by what is swapped in (`glm.models.variants`).

    policy      the only one that is trained; starts as a copy of SFT's adapter, or fresh on top of it
    value       a linear head on the policy's last hidden states, starts at zero
    reference   the SFT model, frozen: the KL penalty is taken to it
    reward      the reward model and its head, frozen

"base" stands for the base as it is. A second reward model, the judge, may be added; and the reward may come from
outside (`glm.training.external_reward`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm.config import Method, Sft
from glm.generation.remote_rollout import RemoteRollout
from glm.generation.rollout import Samples
from glm.models import lineage, methods
from glm.models.adapters import causal_lm, half_precision, load_score
from glm.models.chatglm1 import ChatGLMConfig
from glm.models.packed_attention import VARLEN, attention_of, why_not_packed
from glm.models.variants import Variants
from glm.training.batch import Batch, Inputs, batch_of, inputs_of, packing_for
from glm.training.distributed import from_first, shared_rows
from glm.training.fused_layer import Block, blocks_of, can_fuse, hidden_at, put_side_by_side
from glm.training.layers import decoder_layers, forwards_are, run_layer
from glm.training.sampling import Sampler, Sampling
from glm.training.token_logprobs import token_logprobs

FORWARD_TOKENS = 16384  # tokens of one forward pass without gradients


@dataclass(frozen=True)
class NewPolicy:
    """A policy that is to be trained: by `method`, on the artifacts `below`, fresh in `shape` or as a copy."""

    method: Method
    shape: Sft
    below: tuple[str, ...] = ()
    copy_of: Path | None = None


class Actors(nn.Module):
    """The base with its variants policy, reference and reward, and the heads for value and reward."""

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        policy: Path | NewPolicy,
        reference: Path,
        reward: Path,
        beneath: Sequence[str | Path] = (),
        scorer: Callable[[Batch], Tensor] | None = None,
        judge: Path | None = None,
        rollout: RemoteRollout | None = None,
    ) -> None:
        """Put saved artifacts on `base`, which itself stands on those in `beneath`.

        A `policy` that is a folder of a LoRA is trained as a copy of it; other folders are for evaluation. A `scorer`
        gives rewards [n] in place of `reward`. The `judge` is a reward model too, for `judge_score`. With a `rollout`
        another server draws the policy's answers.

        Raises:
            InputError: a `rollout`, and a policy that is more than one LoRA on the weights of a model.
        """
        super().__init__()
        self.variants = Variants(base, beneath)
        self.variants.add("reference", reference)
        self.variants.add("reward", reward)
        self.judge_head: nn.Linear | None = None
        if judge is not None:
            self.variants.add("judge", judge)
            self.judge_head = load_score(judge).requires_grad_(False).to(base.device)
        self.scorer = scorer
        if isinstance(policy, NewPolicy):
            self.variants.add_trained("policy", policy.method, policy.shape, below=policy.below, copy_of=policy.copy_of)
        elif methods.method_of(policy) == "lora" and not (policy / lineage.FILE_NAME).exists():
            self.variants.add_trained("policy", "lora", Sft(), below=(), copy_of=policy)
        else:
            self.variants.add("policy", policy)
        self.reward_head = load_score(reward).requires_grad_(False).to(base.device)
        self.value_head = nn.Linear(base.config.hidden_size, 1, bias=False).to(base.device)
        nn.init.zeros_(self.value_head.weight)
        self.model = self.variants.model  # its parameters are those of the variant in use
        self.policy = self.variants.trained
        self.trained = [*self.policy.values(), self.value_head.weight]
        self.use("policy")
        self.eval()  # no dropout anywhere, so that the ratio of a fresh rollout is 1
        self.layers = decoder_layers(base)
        self.packed = why_not_packed(base) is None and not any(v.prefix for v in self.variants.variants.values())
        plain = not any(variant.weights for variant in self.variants.variants.values())
        fused = self.packed and plain and can_fuse(base, dropout=False)
        self.joint = put_side_by_side(self.layers) if fused else None  # before the decoder takes its weights
        self.blocks: dict[str, list[Block]] = {}
        self.sampler = Sampler(self.variants, rollout)
        self.compiled = base.device.type == "cuda" and self.sampler.knows_policy
        self.run_layer: Callable[..., Tensor] | None = run_layer if fused else None  # None: the layers' own forward
        if self.compiled:
            torch._dynamo.config.recompile_limit = 32  # adapters, with and without gradient, fixed and moving shapes
            self.run_layer = torch.compile(run_layer)  # one compilation serves all layers

    def use(self, adapter: str) -> None:
        """Put one of policy, reference, reward and base in place; only the policy's parameters require a gradient."""
        self.variants.use(adapter)

    def pad_rows(self) -> None:
        """From now on compute padded rows, in any case."""
        self.packed, self.joint = False, None
        if not self.compiled:
            self.run_layer = None

    def leave_layers_alone(self) -> None:
        """From now on use the layers' own forward, on padded rows: TRL's trainers call it as well."""
        self.pad_rows()
        self.run_layer = None
        if self.compiled:
            torch._dynamo.config.optimize_ddp = False  # layers are compiled one by one: there is no graph to cut
            for layer in self.layers:
                layer.compile()

    def policy_state(self) -> dict[str, Tensor]:
        """What training changes of the policy, for a checkpoint."""
        return {name: parameter.detach() for name, parameter in self.policy.items()}

    @torch.no_grad()
    def load_policy_state(self, state: dict[str, Tensor]) -> None:
        """Put the values of `policy_state` back."""
        for name, parameter in self.policy.items():
            parameter.copy_(state[name])

    def finish(self) -> None:
        """After the training: the policy is in place, in the model's own dtype."""
        self.use("policy")
        self.variants.finish()

    def sample(
        self,
        prompts: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        params: Sampling,
        adapter: str = "policy",
    ) -> Samples:
        """One answer to each prompt, drawn from the whole distribution of the model under `adapter`.

        Log-probabilities are those with which the decoder drew; of answers from elsewhere they are worked out here.
        """
        self.use(adapter)
        decoded = self.sampler.decode(prompts, tokenizer, params, self.value_head)
        if decoded is not None:
            return decoded
        answers, told = self.sampler.generate(prompts, tokenizer, params)
        batch = batch_of(prompts, answers, self.model.device)
        rollout = self.sampler.rollout
        if rollout is not None and told is not None and not rollout.checked:
            rollout.check(self.logprobs(adapter, batch, 1.0), told)
        with torch.no_grad():
            found = [self(adapter, part, params.temperature)[:2] for part in self.parts(batch)]
        logprobs, values = (torch.cat(part) for part in zip(*found, strict=True))
        return Samples(answers, from_first(logprobs), from_first(values))

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Reward of each prompt + answer [n], read at its last token, or as the `scorer` says."""

        def some(rows: Sequence[int]) -> Tensor:
            if self.scorer is not None:
                return self.scorer(batch.rows(rows)).to(self.model.device)
            return self._score(batch.rows(rows), "reward", self.reward_head)

        return shared_rows(len(batch.prompts), some, self.model.device)

    @torch.no_grad()
    def judge_score(self, batch: Batch) -> Tensor:
        """What the judge thinks of each prompt + answer [n]."""
        assert self.judge_head is not None
        return self._score(batch, "judge", self.judge_head)

    def _score(self, batch: Batch, variant: str, head: nn.Linear) -> Tensor:
        self.use(variant)
        found = []
        for part in self.parts(batch):
            inputs = self._inputs(part)
            found.append(self._hidden(inputs, inputs.ends))
        return head(torch.cat(found).float()).squeeze(-1)

    @torch.no_grad()
    def logprobs(self, adapter: str, batch: Batch, temperature: float) -> Tensor:
        """Log-probabilities of the answers' tokens under `adapter`, without gradients: [n, a]."""

        def some(rows: Sequence[int]) -> Tensor:
            return torch.cat([self(adapter, part, temperature)[0] for part in self.parts(batch.rows(rows))])

        return shared_rows(len(batch.prompts), some, self.model.device)

    def parts(self, batch: Batch) -> list[Batch]:
        """The sequences in forward passes of at most FORWARD_TOKENS."""
        return batch.parts(FORWARD_TOKENS, packed=self.packed)

    def forward(
        self, adapter: str, batch: Batch, temperature: float, *, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the answers' tokens, values before each, and entropies: each [n, a], 0 on padding."""
        self.use(adapter)
        inputs = self._inputs(batch)
        states = self._hidden(inputs, inputs.predicting)
        with half_precision(self.model):
            logprobs, entropies = token_logprobs(
                states, self.model.get_output_embeddings(), inputs.tokens, temperature, entropy_grad=entropy_grad
            )
        values = self.value_head(states.float()).squeeze(-1)
        none = batch.mask.new_zeros(batch.mask.numel())
        placed = (none.index_copy(0, inputs.places, found) for found in (logprobs, values, entropies))
        logprobs, values, entropies = (found.view_as(batch.mask) for found in placed)
        return logprobs, values, entropies

    def _inputs(self, batch: Batch) -> Inputs:
        config = causal_lm(self.model).config
        packing = packing_for(config, batch, compiled=self.compiled) if self.packed else None
        return inputs_of(batch, packing, masked=isinstance(config, ChatGLMConfig))

    def _hidden(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """Last hidden states [m, hidden] at `positions` [m] of the flattened rows, under the variant in use."""
        with self._layers() as fused:
            return hidden_at(self.model, positions, fused=fused, **inputs.model)

    @contextmanager
    def _layers(self) -> Iterator[bool]:
        """Inside, the layers run as a forward pass of ours wants them; gives whether they are fused."""
        causal = causal_lm(self.model)
        blocks: Sequence[Block | None] = [None] * len(self.layers)
        if self.joint is not None:
            active = self.variants.active
            if active not in self.blocks:
                self.blocks[active] = blocks_of(self.layers, self.joint)
            blocks = self.blocks[active]
        with (
            attention_of(causal, VARLEN if self.packed else None),
            forwards_are(self.run_layer, self.layers, blocks) if self.run_layer else nullcontext(),
        ):
            yield self.joint is not None
