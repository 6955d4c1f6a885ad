"""Triton kernels of `train.rotary`: one program a token, all its heads at once, so that positions are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate(x_BNHD: Tensor, weight_D: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float) -> Tensor:
    """Norm and rotate; heads of x lie side by side, its rows may be a part of wider ones. Contiguous."""
    out = torch.empty(x_BNHD.shape, dtype=x_BNHD.dtype, device=x_BNHD.device)
    _launch(_rotate_kernel, (x_BNHD, out), weight_D, cos_ND, sin_ND, eps)
    return out


def rotate_backward(
    grad_BNHD: Tensor, x_BNHD: Tensor, weight_D: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float
) -> Tensor:
    """The gradient of `rotate`'s x from that of its output. Contiguous."""
    out = torch.empty(x_BNHD.shape, dtype=x_BNHD.dtype, device=x_BNHD.device)
    _launch(_rotate_backward_kernel, (x_BNHD, out, grad_BNHD), weight_D, cos_ND, sin_ND, eps)
    return out


def _launch(kernel, tensors: tuple[Tensor, ...], weight_D: Tensor, cos_ND: Tensor, sin_ND: Tensor, eps: float) -> None:
    samples, tokens, heads, width = tensors[0].shape
    # Heads side by side in a row; a gradient may come in any layout.
    tensors = tuple(t if t.stride()[2:] == (width, 1) else t.contiguous() for t in tensors)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    kernel[(samples * tokens,)](
        *tensors,
        weight_D.contiguous(),
        cos_ND.contiguous(),
        sin_ND.contiguous(),
        tokens,
        *strides,
        eps,
        HEADS=heads,
        PADDED=triton.next_power_of_2(heads),
        HALF=width // 2,
        HALF_PADDED=triton.next_power_of_2(width // 2),
        num_warps=4,
    )


@triton.jit
def _halves(ptr, at, mask, HALF: tl.constexpr):
    first = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotate_kernel(
    x_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, tokens, x_sample, x_token, out_sample, out_token, eps,
    HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head, d = tl.arange(0, PADDED)[:, None], tl.arange(0, HALF_PADDED)[None, :]
    mask, row = (head < HEADS) & (d < HALF), d < HALF
    at = head * (2 * HALF) + d
    first, second = _halves(x_ptr + sample * x_sample + token * x_token, at, mask, HALF)
    scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]
    weight_first, weight_second = _halves(weight_ptr, d, row, HALF)
    cos_first, cos_second = _halves(cos_ptr + token * (2 * HALF), d, row, HALF)
    sin_first, sin_second = _halves(sin_ptr + token * (2 * HALF), d, row, HALF)
    first, second = first * scale * weight_first, second * scale * weight_second
    out = out_ptr + sample * out_sample + token * out_token
    tl.store(out + at, (first * cos_first - second * sin_first).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, (second * cos_second + first * sin_second).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_backward_kernel(
    x_ptr, out_ptr, grad_ptr, weight_ptr, cos_ptr, sin_ptr, tokens,
    x_sample, x_token, out_sample, out_token, grad_sample, grad_token, eps,
    HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head, d = tl.arange(0, PADDED)[:, None], tl.arange(0, HALF_PADDED)[None, :]
    mask, row = (head < HEADS) & (d < HALF), d < HALF
    at = head * (2 * HALF) + d
    first, second = _halves(x_ptr + sample * x_sample + token * x_token, at, mask, HALF)
    grad_first, grad_second = _halves(grad_ptr + sample * grad_sample + token * grad_token, at, mask, HALF)
    scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]
    weight_first, weight_second = _halves(weight_ptr, d, row, HALF)
    cos_first, cos_second = _halves(cos_ptr + token * (2 * HALF), d, row, HALF)
    sin_first, sin_second = _halves(sin_ptr + token * (2 * HALF), d, row, HALF)
    to_first = (grad_first * cos_first + grad_second * sin_second) * weight_first
    to_second = (grad_second * cos_second - grad_first * sin_first) * weight_second
    first, second = first * scale, second * scale
    along = tl.sum(to_first * first + to_second * second, 1)[:, None] / (2 * HALF)
    out = out_ptr + sample * out_sample + token * out_token
    tl.store(out + at, (scale * (to_first - first * along)).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, (scale * (to_second - second * along)).to(out_ptr.dtype.element_ty), mask=mask)
