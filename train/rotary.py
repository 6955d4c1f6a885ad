"""RMS norm of each head and rotary positions, for queries and keys: one pass over memory each way on a GPU.

What the compiler makes of the same lines takes twice as long (benchmarks/notes.md). A norm whose weight trains, and a
CPU, go through PyTorch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def normed_and_rotated(norm: nn.Module, x_BNHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """x / rms(x) * weight, its halves rotated as diffusers' `apply_rotary_emb(use_real_unbind_dim=-2)` does.

    Computed in float32, in x's dtype. cos_ND, sin_ND: float32. norm: with `weight` [D] and `eps`.
    """
    if x_BNHD.is_cuda and not norm.weight.requires_grad:
        return torch.ops.latentline.rotate(x_BNHD, norm.weight, cos_ND, sin_ND, norm.eps)
    return rotated(rms(norm, x_BNHD), cos_ND, sin_ND).to(x_BNHD.dtype)


def rms(norm: nn.Module, x_BNHD: Tensor) -> Tensor:
    """x / rms(x) * weight over the last dimension, float32."""
    x = x_BNHD.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()


def rotated(x_BNHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    first, second = x_BNHD.chunk(2, -1)
    return x_BNHD * cos_ND.unsqueeze(1) + torch.cat([-second, first], -1) * sin_ND.unsqueeze(1)


@torch.library.custom_op("latentline::rotate", mutates_args=())
def _rotate(x_BNHD: Tensor, weight_D: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float) -> Tensor:
    from train.rotary_kernels import rotate

    return rotate(x_BNHD, weight_D, cos_ND, sin_ND, eps)


@_rotate.register_fake
def _(x_BNHD: Tensor, weight_D: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float) -> Tensor:
    return x_BNHD.new_empty(x_BNHD.shape)


@torch.library.custom_op("latentline::rotate_backward", mutates_args=())
def _rotate_backward(
    grad_BNHD: Tensor, x_BNHD: Tensor, weight_D: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float
) -> Tensor:
    from train.rotary_kernels import rotate_backward

    return rotate_backward(grad_BNHD, x_BNHD, weight_D, cos_ND, sin_ND, eps)


@_rotate_backward.register_fake
def _(grad_BNHD: Tensor, x_BNHD: Tensor, weight_D: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float) -> Tensor:
    return x_BNHD.new_empty(x_BNHD.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.latentline.rotate_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None


_rotate.register_autograd(_differentiate, setup_context=_keep)
