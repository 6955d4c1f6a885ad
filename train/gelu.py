"""The exact GELU, x P(X < x) for a standard normal X, with fewer instructions than the library's error function.

Its complement is the rational approximation of Abramowitz and Stegun, 7.1.26: within 1.5e-7, which is float32's own
rounding. It shares its exponential with the derivative, which is where it saves most (benchmarks/notes.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_P = 0.3275911
_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def gelu(x: Tensor) -> Tensor:
    """GELU of x, computed in float32, in x's dtype."""
    return _Gelu.apply(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        below, _ = _normal(x.float())
        return (x.float() * below).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        below, density = _normal(x.float())
        return (grad.float() * (below + x.float() * density)).to(x.dtype)


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The standard normal's distribution function and density, float32."""
    z = x.abs() * math.sqrt(0.5)
    t = 1 / (1 + _P * z)
    exponential = torch.exp(-z * z)
    tail = 0.5 * t * (_A[0] + t * (_A[1] + t * (_A[2] + t * (_A[3] + t * _A[4])))) * exponential
    return torch.where(x < 0, tail, 1 - tail), exponential * (1 / math.sqrt(2 * math.pi))
