"""What each block of the transformer keeps for its backward pass, and what that costs.

A block is at one of four levels, from the least memory and the most recomputation to the opposite:

    full        its input alone; the whole block runs again
    attention   also attention's output: the dearest kernel runs once
    products    also the wide matrix products; only cheap pointwise work runs again
    none        whatever autograd keeps

`auto` measures on one block what each level keeps, then gives every block the richest level that fits the device:
attention outputs first, then products, then everything. On CUDA blocks are compiled, one graph a level.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from train.attention import SAVED_OPS
from train.fp8 import MATMUL

Level = Literal["full", "attention", "products", "none"]
Policy = Literal["auto", "none", "selective", "full"]
LEVELS: tuple[Level, ...] = ("full", "attention", "products", "none")
POLICY_LEVELS: dict[Policy, Level] = {"none": "none", "selective": "attention", "full": "full"}

# What a level keeps of a block, and what a block needs while its backward pass runs, in values a token and hidden
# channel. Measured on an H200 with the 2B model at 31,104 tokens (benchmarks/results); `auto` measures its own.
KEPT_VALUES: dict[Level, float] = {"full": 1.0, "attention": 3.2, "products": 13.2, "none": 25.6}
WORKING_VALUES: dict[Level, float] = {"full": 28.0, "attention": 27.1, "products": 15.1, "none": 7.3}
OUTSIDE_VALUES = 6.0
"""Of the layers before and after the blocks."""

# Adapters rarely reach this rank; the products that touch it are a few per mille of a block's memory.
_LOW_RANK = 512
_MATRIX_PRODUCTS = ("aten.mm.default", "aten.addmm.default")


@dataclass(frozen=True)
class MemoryPlan:
    """Levels by block, and the bytes they were chosen by.

    resident: weights, gradients and optimizer state. kept: by level, of one block. working: by level, the most a block
    needs beside what it keeps. limit: bytes the run may use, None if nothing was measured.
    """

    levels: tuple[Level, ...]
    resident: int
    kept: dict[Level, int]
    working: dict[Level, int]
    limit: int | None

    @property
    def peak(self) -> int:
        """Predicted peak, bytes: when a block works, those after it keep nothing, or nothing any more."""
        kept = itertools.accumulate(self.kept[level] for level in self.levels)
        return self.resident + max(
            before + self.working[level] for before, level in zip(kept, self.levels, strict=True)
        )

    def describe(self) -> str:
        counts = Counter(self.levels)
        mix = ", ".join(f"{counts[level]} x {level}" for level in LEVELS if counts[level])
        limit = "" if self.limit is None else f" of {self.limit / 2**30:.1f} GiB"
        return f"activation: {mix}; predicted peak {self.peak / 2**30:.1f} GiB{limit}"


def choose_levels(
    num_blocks: int, *, resident: int, kept: dict[Level, int], working: dict[Level, int], limit: int
) -> MemoryPlan:
    """Give every block the richest level that fits, the last blocks first: the backward pass frees what they keep
    before it gets to the others. The poorest level for all if nothing fits."""
    for poor, rich in reversed(list(itertools.pairwise(LEVELS))):
        for count in range(num_blocks, -1, -1):
            levels = (poor,) * (num_blocks - count) + (rich,) * count
            plan = MemoryPlan(levels, resident, kept, working, limit)
            if plan.peak <= limit:
                return plan
    return MemoryPlan((LEVELS[0],) * num_blocks, resident, kept, working, limit)


def estimate(
    level: Level, *, num_blocks: int, resident: int, tokens: int, hidden_size: int, itemsize: int
) -> MemoryPlan:
    """Predict the memory of a policy without a device, from `KEPT_VALUES`; tokens are of one micro-batch."""
    value = tokens * hidden_size * itemsize
    kept = {name: int(value * values) for name, values in KEPT_VALUES.items()}
    working = {name: int(value * values) for name, values in WORKING_VALUES.items()}
    resident += int(value * OUTSIDE_VALUES)
    return MemoryPlan((level,) * num_blocks, resident, kept, working, None)


def set_levels(blocks: Sequence[nn.Module], levels: Sequence[Level], *, compiled: bool) -> None:
    """Give each block its level; with `compiled`, blocks of one level share one compiled graph."""
    runs = {level: _run_at(level, type(blocks[0]).forward, compiled=compiled) for level in set(levels)}
    for block, level in zip(blocks, levels, strict=True):
        block.forward = partial(runs[level], block)


def measured_plan(
    block: nn.Module, inputs: tuple[Tensor, ...], *, num_blocks: int, resident: int, limit: int, every: bool = False
) -> MemoryPlan:
    """Run one block forward and backward to see what each level keeps, and choose every block's level.

    block, inputs: on a CUDA device, the first input requiring a gradient. resident: bytes of weights, gradients and
    optimizer state. Levels are measured from the richest on, until all blocks fit; `every` one where ranks measure
    together, so that they do the same. Raises `torch.OutOfMemoryError` if
    the device has not enough for one block.
    """
    value = inputs[0].nbytes
    resident += int(value * OUTSIDE_VALUES)
    kept = {level: int(value * values) for level, values in KEPT_VALUES.items()}
    working = {level: int(value * values) for level, values in WORKING_VALUES.items()}
    for level in reversed(LEVELS):
        set_levels([block], [level], compiled=True)
        try:
            for _ in range(2):  # the first run compiles
                kept[level], working[level] = _measure_once(block, inputs)
        except torch.OutOfMemoryError:
            if level == LEVELS[0]:
                raise
            working[level] = limit
        if not every and MemoryPlan((level,) * num_blocks, resident, kept, working, limit).peak <= limit:
            break
    del block.forward
    return choose_levels(num_blocks, resident=resident, kept=kept, working=working, limit=limit)


def _measure_once(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    device = inputs[0].device
    block.zero_grad(set_to_none=True)
    inputs[0].grad = None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    output = block(*inputs)
    kept = torch.cuda.memory_allocated(device) - before
    output.backward(torch.ones_like(output))
    working = torch.cuda.max_memory_allocated(device) - before - kept
    block.zero_grad(set_to_none=True)
    inputs[0].grad = None
    return kept, working


def _run_at(level: Level, forward: Callable[..., Tensor], *, compiled: bool) -> Callable[..., Tensor]:
    run = forward if level == "none" else partial(_recomputed, forward, level)
    if not compiled:
        return run
    # Its one warning here, a rank, asks that checkpointed regions hold no in-place operations; ours hold none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # As everything was measured. Triton 3.9 asks for a choice, 3.10 will choose otherwise.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    # 28 blocks run one graph a level; a second graph serves the first block, whose input needs no gradient.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(run, fullgraph=True, dynamic=False)


def _recomputed(forward: Callable[..., Tensor], level: Level, block: nn.Module, *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(block, *inputs)
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep, level))
    return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=contexts)


def _keep(level: Level, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op)
    if level == "full":
        return CheckpointPolicy.PREFER_RECOMPUTE
    if name in SAVED_OPS:
        return CheckpointPolicy.MUST_SAVE
    if name == MATMUL:
        return CheckpointPolicy.MUST_SAVE if level == "products" else CheckpointPolicy.PREFER_RECOMPUTE
    if name in _MATRIX_PRODUCTS:
        left, right = args[-2:]
        if level == "products" or min(left.shape[0], right.shape[1]) <= _LOW_RANK:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
