"""Layer norm without weights, with its statistics in two plain passes.

Same values as `torch.nn.functional.layer_norm` in float32. Compiled for a GPU that becomes Welford's running update,
whose divisions cost more than reading the row, from the cache, once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def normalise(x: Tensor, eps: float) -> Tensor:
    """x [..., C] less its mean, over its standard deviation: float32."""
    return _Normalise.apply(x, eps)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        mean = x.float().mean(-1, keepdim=True)
        centred = x.float() - mean
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, mean, scale)
        return centred * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, mean, scale = ctx.saved_tensors
        y = (x.float() - mean) * scale
        grad_x = scale * (grad - grad.mean(-1, keepdim=True) - y * (grad * y).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), None
