"""How the steps of SFT and reward model are computed, decided once per run and said in the log."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glm.config import Strategy, Training
from glm.data.cache import TokenizedRows
from glm.data.packing import PackedRows, pack
from glm.errors import InputError
from glm.models.adapters import causal_lm
from glm.models.methods import Tunable
from glm.models.packed_attention import VARLEN, packed_implementation, why_not_packed
from glm.training.distributed import world_size
from glm.training.fused_layer import can_fuse
from glm.training.layers import Checkpointing, choose_checkpointing, optimizer_bytes
from glm.training.packing import Packing, own_lengths, prefix_lm_of

Example = dict[str, Any]
Sequences = Callable[[Example], list[list[int]]]  # the token sequences of an example: one for SFT, all of a ranking

ROW_MULTIPLE = 256  # compiled rows come in multiples of so many tokens
COMPILE_TOKENS = 2_000_000  # trained tokens from which half a minute of compiling pays on a 6B model
SHARING_PAYS = 0.04  # share of the tokens that shared prompts must spare: the others cost 2 to 4 % more on a GPU
USABLE_MEMORY = 0.92  # of what is free: fragments, and what the libraries take for themselves

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How steps are computed, decided once per run. It changes speed and memory, not results.

    `train_set` holds examples, or with `tokens_per_step` rows of examples; `step_size` of them are an optimizer step,
    and `row_tokens` the tokens of the largest part that is computed at a time.
    """

    train_set: Sequence[Any]
    step_size: int
    packing: Packing | None
    attention: str | None  # of packed rows, as transformers calls it
    copied_keys: int  # tokens of such a part whose keys and values are copied for answers that share a prompt
    fused: bool  # layers by glm.training.fused_layer
    compiled: bool
    checkpointing: Checkpointing
    row_tokens: int
    epoch_tokens: int
    steps: int
    strategy: Strategy  # of several processes
    holders: int  # processes that share weights, gradients and moments out among them


def plan(
    model: Tunable,
    examples: Sequence[Example],
    sequences: Sequences,
    params: Training,
    *,
    stage: str,
    seed: int,
    strategy: Strategy = "ddp",
    share_prompt: bool = False,
) -> Plan:
    """Decide on packing, compiling and checkpointing for training `model` on `examples`, and log the choice.

    `strategy` is for method full in several processes; all else is trained by DDP. `share_prompt`: the answers of a
    ranking may share the computation of their prompt. They do if rows are packed, the attention is varlen, and it
    spares enough.
    """
    base = causal_lm(model)
    on_gpu = base.device.type == "cuda"
    prefix_lm = prefix_lm_of(base.config)
    attention = packed_implementation(base, params.attn_implementation)
    obstacle = "packing: false" if not params.packing else why_not_packed(base, attention)
    by_example = _whole_lengths(examples, sequences)
    longest, whole = max(map(max, by_example)), sum(map(sum, by_example))
    max_answers = 1
    if share_prompt and obstacle is None and attention == VARLEN:
        ids = examples.rankings() if isinstance(examples, TokenizedRows) else map(sequences, examples)
        own = [own_lengths(each, prefix_lm) for each in ids]
        if sum(map(sum, own)) < (1 - SHARING_PAYS) * whole:
            by_example, max_answers = own, max(map(len, own))
    lengths = [length for each in by_example for length in each]
    step_size = params.per_device_train_batch_size * params.gradient_accumulation_steps
    run_tokens = sum(lengths) * params.num_train_epochs
    if params.max_steps > 0:
        run_tokens = params.max_steps * (params.tokens_per_step or step_size * sum(lengths) / len(examples))

    if obstacle and params.tokens_per_step:
        raise InputError(f"{stage}.tokens_per_step {params.tokens_per_step} needs packed rows: {obstacle}")
    compiled = params.torch_compile
    if compiled == "auto":
        compiled = on_gpu and obstacle is None and run_tokens >= COMPILE_TOKENS

    train_set: Sequence[Any] = examples
    packing = None
    if obstacle is None:
        row = min(params.tokens_per_forward, params.tokens_per_step or params.tokens_per_forward)
        per_step = step_size * max(map(len, by_example))
        most = min(per_step, row // min(lengths))
        if params.tokens_per_step:
            if isinstance(examples, TokenizedRows):
                train_set = examples.packed(row, seed, [sum(each) for each in by_example])
            else:
                train_set = PackedRows(examples, pack([sum(each) for each in by_example], row, seed))
            step_size = params.tokens_per_step // row
            most = max(sum(len(by_example[index]) for index in filled) for filled in train_set.rows)
        packing = Packing(row, ROW_MULTIPLE if compiled else 1, most, longest, prefix_lm, max_answers)
        tokens = max(row, longest)
    else:
        tokens = params.per_device_train_batch_size * max(map(len, by_example)) * longest
    copied = tokens * (whole - sum(lengths)) // sum(lengths)

    holders = world_size() if params.method == "full" and strategy != "ddp" else 1
    checkpointing = params.activation_checkpointing
    if checkpointing == "auto":
        checkpointing = "none"
        if on_gpu:  # what sharing out the weights will free is left for the layers that are gathered
            state = optimizer_bytes(model, params.optim) // holders
            free = free_memory()
            checkpointing = choose_checkpointing(base, tokens, state, compiled=compiled, free=free, copied_keys=copied)
    fused = params.fused_layers and obstacle is None and can_fuse(base)
    steps = -(-len(train_set) // step_size) * params.num_train_epochs
    total = params.max_steps if params.max_steps > 0 else math.ceil(steps)
    used = None if obstacle else attention
    found = Plan(
        train_set=train_set,
        step_size=step_size,
        packing=packing,
        attention=used,
        copied_keys=copied,
        fused=fused,
        compiled=compiled,
        checkpointing=checkpointing,
        row_tokens=tokens,
        epoch_tokens=sum(lengths),
        steps=total,
        strategy=strategy if holders > 1 else "ddp",
        holders=holders,
    )
    words = _in_words(found, len(examples), sum(lengths), obstacle)
    if share_prompt and packing is not None:
        words += f"; {_sharing_in_words(found, whole)}"
    logger.info("%s: %s", stage, words)
    return found


def free_memory() -> int:
    """Bytes of GPU memory that this process can still get."""
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    allowed = int(torch.cuda.memory.get_per_process_memory_fraction() * total) - reserved
    return int(USABLE_MEMORY * (min(free, allowed) + reserved - torch.cuda.memory_allocated()))


def _whole_lengths(examples: Sequence[Example], sequences: Sequences) -> list[list[int]]:
    if isinstance(examples, TokenizedRows):
        return examples.lengths()
    return [[len(sequence) for sequence in sequences(example)] for example in examples]


def _sharing_in_words(plan: Plan, whole: int) -> str:
    """What becomes of the answers' common prompts; `whole`: tokens of an epoch where each is computed for itself."""
    if plan.attention != VARLEN:
        return f"a prompt is computed for each of its answers: attention {plan.attention} cannot share it, varlen can"
    if plan.epoch_tokens == whole:
        return f"a prompt is computed for each of its answers: sharing it spares under {100 * SHARING_PAYS:.0f} %"
    return f"a prompt is computed once for all its answers, which spares {100 * (1 - plan.epoch_tokens / whole):.0f} %"


def _in_words(plan: Plan, examples: int, tokens: int, obstacle: str | None) -> str:
    unit = "examples"
    if plan.packing is None:
        layout = f"padded ({obstacle})"
    elif isinstance(plan.train_set, PackedRows):
        unit = f"rows, about {examples * plan.step_size / len(plan.train_set):.0f} examples"
        fill = 100 * tokens / len(plan.train_set) / plan.packing.tokens_per_row
        layout = f"packed, {len(plan.train_set)} rows of {plan.packing.tokens_per_row} tokens, {fill:.1f} % filled"
    else:
        layout = f"packed, rows of at most {plan.packing.tokens_per_row} tokens"
    steps = -(-len(plan.train_set) // plan.step_size)
    return (
        f"{examples} examples of {tokens / examples:.0f} tokens; {layout}; {steps} steps an epoch of {plan.step_size} "
        f"{unit}; attention {plan.attention or 'as loaded'}; fused_layers {str(plan.fused).lower()}; "
        f"torch_compile {str(plan.compiled).lower()}; "
        f"activation_checkpointing {plan.checkpointing}"
    )
