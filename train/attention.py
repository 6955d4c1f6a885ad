"""Attention kernels, and which one runs.

PyTorch's scaled_dot_product_attention (cuDNN on Hopper) is always there. FlashAttention-4's kernels for Hopper and
Blackwell, from the optional package `flash-attn-4`, are faster where installed. `choose_kernel` measures what there is
at a run's own shape; nothing is chosen by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Literal["flash4", "cudnn", "sdpa"]

SAVED_OPS = (
    "latentline.flash4.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
)
"""Names of the operators whose output and log-sum-exp are worth keeping for the backward pass."""

_log = logging.getLogger(__name__)
_kernel: Kernel = "sdpa"

_RUNS = 4
"""With 16 heads and 512 keys in blocks of 128: 256 programs, two rounds of an H200's 132 multiprocessors."""


def attend(query_BNHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> Tensor:
    """Softmax attention without mask, scale 1 / sqrt(D), by the kernel in use: [B, N, H, D]."""
    if _kernel == "flash4":
        return torch.ops.latentline.flash4(query_BNHD, key_BLHD, value_BLHD)[0]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_BNHD, key_BLHD, value_BLHD))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend_to_few(query_BNHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> Tensor:
    """`attend`, for few keys and many queries: these are cut into runs that count as samples.

    The backward pass works by blocks of keys and by samples; a text's few blocks would leave half of the GPU idle.
    """
    runs = next(count for count in (_RUNS, 3, 2, 1) if query_BNHD.shape[1] % count == 0)
    key, value = (tensor.repeat_interleave(runs, 0) for tensor in (key_BLHD, value_BLHD))
    return attend(query_BNHD.unflatten(1, (runs, -1)).flatten(0, 1), key, value).unflatten(0, (-1, runs)).flatten(1, 2)


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Run attention with one kernel inside the block; code compiled inside keeps it."""
    global _kernel
    before, _kernel = _kernel, kernel
    try:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if kernel == "cudnn" else contextlib.nullcontext():
            yield
    finally:
        _kernel = before


def choose_kernel(
    shape_BNHD: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, backward: bool = True
) -> Kernel:
    """Return the kernel with the shortest forward pass of self-attention at this shape, with the backward pass or not.

    Off CUDA, and for float32, that is PyTorch's own choice, `sdpa`. A kernel that refuses the shape is passed over.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return "sdpa"
    candidates: list[Kernel] = ["cudnn", "sdpa"]
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        candidates.insert(0, "flash4")
    times = {kernel: _measure(kernel, shape_BNHD, dtype, device, backward) for kernel in candidates}
    measured = {kernel: milliseconds for kernel, milliseconds in times.items() if milliseconds is not None}
    best = min(measured, key=lambda kernel: measured[kernel])
    _log.info("attention: %s, from %s", best, {kernel: f"{value:.1f} ms" for kernel, value in measured.items()})
    return best


def _measure(
    kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backward: bool
) -> float | None:
    query, key, value = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype, device=device)

    def run() -> None:
        output = attend(query, key, value)
        if backward:
            torch.autograd.grad(output, (query, key, value), grad)

    with use_kernel(kernel), torch.set_grad_enabled(backward):
        try:
            run()
        except RuntimeError as error:
            _log.warning("attention kernel %s cannot run here: %s", kernel, str(error).splitlines()[0])
            return None
        return _milliseconds(run)


def _milliseconds(run: Callable[[], None]) -> float:
    run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(3):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 3


@functools.cache
def _flash4_library() -> Any:
    from flash_attn.cute import interface

    # Said of an argument that the library passes to itself, for each kernel it compiles.
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
    return interface


@torch.library.custom_op("latentline::flash4", mutates_args=())
def _flash4(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-4: output [B, N, H, D] and log-sum-exp [B, H, N] float32."""
    out, lse, *_ = _flash4_library()._flash_attn_fwd(query, key, value, return_lse=True)
    return out, lse


@_flash4.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("latentline::flash4_backward", mutates_args=())
def _flash4_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _flash4_library()._flash_attn_bwd(query, key, value, out, grad.contiguous(), lse)
    grad_query, grad_key, grad_value, *_ = grads
    return grad_query, grad_key, grad_value


@_flash4_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.latentline.flash4_backward(grad, *ctx.saved_tensors)


_flash4.register_autograd(_differentiate, setup_context=_keep)
