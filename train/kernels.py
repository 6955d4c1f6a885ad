"""A Triton kernel of the 8-bit linear layers: a low-rank product added in place.

The library's product with an addend is slower the wider the output is, for an inner dimension as small as an adapter's
rank (benchmarks/notes.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, RANKS = 64, 128, 32


def add_low_rank(y_NM: Tensor, low_NR: Tensor, up_MR: Tensor) -> None:
    """y += low up^T, in place. y: contiguous. Sums are float32, rounded once to y's dtype."""
    rows, columns = y_NM.shape
    grid = (triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS))
    _add_low_rank_kernel[grid](
        y_NM,
        low_NR,
        up_MR,
        rows,
        columns,
        *low_NR.stride(),
        *up_MR.stride(),
        RANK=low_NR.shape[1],
        BN=ROWS,
        BM=COLUMNS,
        BR=RANKS,
        num_warps=4,
    )


@triton.jit
def _add_low_rank_kernel(
    y_ptr,
    low_ptr,
    up_ptr,
    rows,
    columns,
    low_row,
    low_rank,
    up_row,
    up_rank,
    RANK: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = (n < rows)[:, None] & (m < columns)[None, :]
    offset = n.to(tl.int64)[:, None] * columns + m[None, :]
    added = tl.zeros((BN, BM), dtype=tl.float32)
    for first in tl.static_range(0, RANK, BR):
        r = first + tl.arange(0, BR)
        low = tl.load(
            low_ptr + n.to(tl.int64)[:, None] * low_row + r[None, :] * low_rank,
            mask=(n < rows)[:, None] & (r < RANK)[None, :],
            other=0.0,
        )
        up = tl.load(
            up_ptr + m[None, :] * up_row + r[:, None] * up_rank,
            mask=(m < columns)[None, :] & (r < RANK)[:, None],
            other=0.0,
        )
        added = tl.dot(low, up, added)
    y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, (y + added).to(y_ptr.dtype.element_ty), mask=mask)
