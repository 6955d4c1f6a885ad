"""Triton kernels of the VAE encoder, for GPUs with a tensor memory accelerator (Hopper and later).

They work on the flat layout of `encode.grid`: one row of channels a pixel, zero pixels between lines and frames.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# As the kernels were measured. Triton 3.9 asks for a choice, 3.10 will choose otherwise.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

BLOCK_K = 64
NORM_ROWS = 32


@dataclass(frozen=True)
class Tile:
    """Output tile of one program: rows x (columns + more), columns and more being powers of two."""

    rows: int
    columns: int
    more: int
    warps: int
    stages: int


# Measured on an H200 with bfloat16 (benchmarks/notes.md). 96 and 192 channels are no power of two: two
# accumulators waste nothing.
TILES = {
    96: Tile(rows=128, columns=64, more=32, warps=4, stages=4),
    192: Tile(rows=256, columns=128, more=64, warps=8, stages=3),
    384: Tile(rows=256, columns=128, more=64, warps=8, stages=3),
}
OTHER_TILE = Tile(rows=128, columns=32, more=0, warps=4, stages=4)


def pack_weight(weight: Tensor, channels: int) -> Tensor:
    """Reorder a kernel [N, C, 3, 3, 3] to [N, 9 * K], K = 3 C padded to whole blocks, for inputs of `channels`."""
    padded = torch.nn.functional.pad(weight.movedim(1, -1), (0, channels - weight.shape[1]))
    columns = padded.reshape(weight.shape[0], 9, 3 * channels)
    return torch.nn.functional.pad(columns, (0, -(3 * channels) % _block(channels))).flatten(1).contiguous()


def conv(
    x_RC: Tensor,
    packed_NK: Tensor,
    bias_N: Tensor,
    *,
    rows: int,
    line: int,
    frame: int,
    height: int,
    width: int,
    residual_RN: Tensor | None,
) -> Tensor:
    """Convolve: [rows, N], zero where the layout has no pixel. line, frame: rows from one to the next."""
    num_outputs, channels = packed_NK.shape[0], x_RC.shape[1]
    tile, block = TILES.get(num_outputs, OTHER_TILE), _block(channels)
    # Three neighbouring pixels are 3 C consecutive values, so a view with overlapping rows serves three taps.
    x_desc = TensorDescriptor(x_RC, [x_RC.shape[0] - 2, 3 * channels], [channels, 1], [tile.rows, block])
    shape, strides = list(packed_NK.shape), [packed_NK.shape[1], 1]
    y_RN = torch.empty(rows, num_outputs, dtype=x_RC.dtype, device=x_RC.device)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(num_outputs, tile.columns + tile.more),)
    _conv_kernel[grid](
        x_desc,
        TensorDescriptor(packed_NK, shape, strides, [tile.columns, block]),
        TensorDescriptor(packed_NK, shape, strides, [tile.more or tile.columns, block]),
        bias_N,
        y_RN if residual_RN is None else residual_RN,
        y_RN,
        rows,
        line,
        frame,
        height,
        width,
        N=num_outputs,
        INNER=3 * channels,
        BM=tile.rows,
        BN=tile.columns,
        BN_MORE=tile.more,
        BK=block,
        HAS_RESIDUAL=residual_RN is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_RN


def norm_silu(y_RC: Tensor, gamma_C: Tensor, out_RC: Tensor) -> None:
    """Write SiLU(y / |y| sqrt(C) gamma) to `out_RC`; rows of zeros stay zeros."""
    rows, channels = y_RC.shape
    _norm_silu_kernel[(triton.cdiv(rows, NORM_ROWS),)](
        y_RC, gamma_C, out_RC, rows, channels**0.5, C=channels, BC=triton.next_power_of_2(channels), BM=NORM_ROWS
    )


def _block(channels: int) -> int:
    return min(BLOCK_K, triton.next_power_of_2(3 * channels))


@triton.jit
def _store_tile(acc, n, m, rows, inside, bias_ptr, residual_ptr, y_ptr, N: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m < rows)[:, None] & (n < N)[None, :]
    offset = m.to(tl.int64)[:, None] * N + n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, tl.where(inside[:, None], acc, 0.0).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "line", "frame", "height", "width"])
def _conv_kernel(
    x_desc,
    w_desc,
    w_more_desc,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    line,
    frame,
    height,
    width,
    N: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BN_MORE: tl.constexpr,
    BK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (N + BN + BN_MORE - 1) // (BN + BN_MORE)
    INNER_BLOCKS: tl.constexpr = (INNER + BK - 1) // BK
    tile = tl.program_id(0)
    m0 = (tile // COLUMN_TILES) * BM
    n0 = (tile % COLUMN_TILES) * (BN + BN_MORE)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if BN_MORE > 0:
        acc_more = tl.zeros((BM, BN_MORE), dtype=tl.float32)
    for step in range(9 * INNER_BLOCKS):
        tap = step // INNER_BLOCKS
        a = x_desc.load([m0 + (tap // 3) * frame + (tap % 3) * line, (step % INNER_BLOCKS) * BK])
        acc = tl.dot(a, w_desc.load([n0, step * BK]).T, acc)
        if BN_MORE > 0:
            acc_more = tl.dot(a, w_more_desc.load([n0 + BN, step * BK]).T, acc_more)
    m = m0 + tl.arange(0, BM)
    inside = (m % line < width) & ((m % frame) // line < height)
    n = n0 + tl.arange(0, BN)
    _store_tile(acc, n, m, rows, inside, bias_ptr, residual_ptr, y_ptr, N, HAS_RESIDUAL)
    if BN_MORE > 0:
        n_more = n0 + BN + tl.arange(0, BN_MORE)
        _store_tile(acc_more, n_more, m, rows, inside, bias_ptr, residual_ptr, y_ptr, N, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["rows"])
def _norm_silu_kernel(y_ptr, gamma_ptr, out_ptr, rows, root, C: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    mask = (m < rows)[:, None] & (c < C)[None, :]
    offset = m.to(tl.int64)[:, None] * C + c[None, :]
    y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), 1e-12)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    normed = y * (root / length)[:, None] * gamma[None, :]
    tl.store(out_ptr + offset, (normed * tl.sigmoid(normed)).to(out_ptr.dtype.element_ty), mask=mask)
