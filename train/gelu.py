"""The exact GELU, x P(X < x) for a standard normal X, with fewer instructions than the library's error function.

P(X < x) is 1 / (1 + 2^-z) for an odd z; seven terms of it, fitted to P on [-6, 6], are within 3e-7 in float32
everywhere. On a GPU that is few enough instructions to wait for memory instead (benchmarks/notes.md). 1 / y is written
as the square of y^(-1/2): two instructions where a division takes six.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (
    -5.20990767e-09, 3.85044945e-07, -1.1452429e-05, 1.59389405e-04, 9.55929564e-05, -1.04838581e-01, -2.3022072,
)  # fmt: skip
"""Of -z / x as a polynomial in x^2, the highest power first."""


def gelu(x: Tensor) -> Tensor:
    """GELU of x, computed in float32, in x's dtype."""
    return _Gelu.apply(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.dtype == torch.float32:  # compiled by PyTorch 2.11, a `float` that returns its input loses the gradient
            return x * _below(x)
        return (x.float() * _below(x.float())).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = x.float()
        density = torch.exp2(wide * wide * (-0.5 / math.log(2))) * (1 / math.sqrt(2 * math.pi))
        return (grad.float() * (_below(wide) + wide * density)).to(x.dtype)


def _below(x: Tensor) -> Tensor:
    """The standard normal's distribution function, float32."""
    square = x * x
    ratio = torch.full_like(square, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        ratio = ratio * square + coefficient
    root = torch.rsqrt(1 + torch.exp2(x * ratio))
    return root * root
