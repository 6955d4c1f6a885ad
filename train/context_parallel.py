"""Context parallel: several ranks share a sample, each computing an equal run of its tokens.

Everything in a block works on one token at a time, except self-attention: there each rank's queries meet the keys and
values of all tokens, gathered from the ranks. That is exact, for any number of ranks and any attention kernel, and
costs a block two collectives of N x hidden values forward and two backward (two more where the forward runs again):
at 84,480 tokens in bfloat16 346 MB each, held for as long as the block's attention runs. Rings and Ulysses move less
but need a kernel of their own or a number of heads that the ranks divide.

`sharing` turns it on; outside of it, or with None, every function here returns its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifests.errors import UsageError

MOST_RANKS = 8


@dataclass(frozen=True)
class Context:
    """The ranks that share this rank's samples. rank: among them. group: name of their process group."""

    rank: int
    world: int
    group: str


_context: Context | None = None


@contextmanager
def sharing(context: Context | None) -> Iterator[None]:
    """Share samples with the ranks of `context` inside the block; all of them must run the same there.

    The transformer still takes whole samples and returns whole predictions, equal on these ranks. A backward pass
    from them leaves each rank with its part of the gradient; the sum over the ranks is the gradient.
    """
    global _context
    before, _context = _context, context
    try:
        yield
    finally:
        _context = before


def own_tokens(x: Tensor, dim: int) -> Tensor:
    """This rank's run of the tokens that lie along `dim`."""
    if _context is None:
        return x
    num_tokens = x.shape[dim] // _context.world
    return x.narrow(dim, _context.rank * num_tokens, num_tokens).contiguous()


def own_rows(modulation_BTC: Tensor, num_tokens: int) -> Tensor:
    """The rows that modulate this rank's tokens, each for an equal run of them: [B, runs, C].

    modulation_BTC: a row a latent frame. num_tokens: of the whole sample. A rank's run may begin and end inside a
    frame: runs are then as long as the greatest common divisor of its tokens and a frame's.
    """
    if _context is None:
        return modulation_BTC
    frame, own = num_tokens // modulation_BTC.shape[1], num_tokens // _context.world
    first = _context.rank * own
    rows = [token // frame for token in range(first, first + own, math.gcd(frame, own))]
    return modulation_BTC[:, rows]


def all_tokens(first: Tensor, second: Tensor | None = None) -> tuple[Tensor, ...]:
    """All ranks' tokens, in order, of one or two tensors [B, N, ...]; gradients go where these came from, summed."""
    if _context is None:
        return (first,) if second is None else (first, second)
    swapped = [_swapped(tensor) for tensor in (first, second) if tensor is not None]
    gathered = _Gathered.apply(_context.world, _context.group, *swapped, *[None] * (2 - len(swapped)))
    return tuple(_swapped(tensor) for tensor in gathered)


def whole(x_BNC: Tensor) -> Tensor:
    """The tokens of all ranks, in order. Each rank differentiates its own only: the others do the same as it does."""
    if _context is None:
        return x_BNC
    return _swapped(_Whole.apply(_swapped(x_BNC), _context.rank, _context.world, _context.group))


def gather_first(x: Tensor, ranks: Context) -> Tensor:
    """The ranks' tensors, joined along the first dimension in their order; without gradients."""
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), ranks.world, ranks.group))


def check_divides(context_parallel: int, tokens_by_shape: Mapping[tuple[int, ...], int]) -> None:
    """Raise `UsageError` if the tokens of a sample cannot be shared out evenly. Shapes are (C, T, H, W)."""
    fitting = [ranks for ranks in range(1, MOST_RANKS + 1) if not _undivided(ranks, tokens_by_shape.values())]
    if context_parallel not in fitting:
        shape, tokens = next((shape, n) for shape, n in tokens_by_shape.items() if n % context_parallel)
        raise UsageError(
            f"train.context_parallel is {context_parallel}, which does not divide the {tokens:,} tokens of samples of "
            f"{'x'.join(map(str, shape))}; every sample of the snapshot allows {', '.join(map(str, fitting))}"
        )


def _undivided(ranks: int, token_counts: Iterable[int]) -> bool:
    return any(count % ranks for count in token_counts)


class _Gathered(torch.autograd.Function):
    # PyTorch 2.11 compiles Functions wrongly in two ways. An operation of the forward that returns its own input, as
    # `contiguous` may, loses the gradient without a word: `_swapped` is outside. And compiled without gradients, it
    # tells by the number of arguments whether there is a ctx: no `*tensors`.
    @staticmethod
    def forward(ctx: Any, world: int, group: str, first_NB: Tensor, second_NB: Tensor | None) -> tuple[Tensor, ...]:
        ctx.world, ctx.group = world, group
        tensors = [tensor for tensor in (first_NB, second_NB) if tensor is not None]
        started = [_ops.all_gather_into_tensor(tensor, world, group) for tensor in tensors]
        return tuple(_ops.wait_tensor(tensor) for tensor in started)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        started = [_ops.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.world, ctx.group) for grad in grads]
        gathered = [_ops.wait_tensor(tensor) for tensor in started]
        return None, None, gathered[0], gathered[1] if len(gathered) > 1 else None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NB: Tensor, rank: int, world: int, group: str) -> Tensor:
        ctx.first, ctx.count = rank * x_NB.shape[0], x_NB.shape[0]
        return _ops.wait_tensor(_ops.all_gather_into_tensor(x_NB, world, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.narrow(0, ctx.first, ctx.count), None, None, None


# The functional collectives by their operators: traceable, and the same from PyTorch 2.11 on, unlike their wrappers.
_ops = torch.ops._c10d_functional


def _swapped(x: Tensor) -> Tensor:
    """Samples and tokens swapped: collectives join tensors along their first dimension."""
    return x.transpose(0, 1).contiguous()
