"""A clip laid out flat, so that a causal 3x3x3 convolution is a matrix product at shifted offsets.

A clip [T, H, W, C] becomes rows of C values, one row a pixel, with one zero pixel after each line and one zero line
after each frame: [T * (H + 1) * (W + 1), C]. In front of a convolution's input stand one zero line, and the last two
frames of the chunk before (zeros at the clip's start). All 27 neighbours of a pixel then lie at fixed distances, the
same zeros serve as the padding on both sides, and nothing has to be padded, copied or gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HISTORY = 2
"""Frames a causal convolution looks back."""


@dataclass(frozen=True)
class Grid:
    """T frames of H x W pixels in the flat layout."""

    frames: int
    height: int
    width: int

    @property
    def line(self) -> int:
        """Rows from one line of pixels to the next."""
        return self.width + 1

    @property
    def frame(self) -> int:
        """Rows from one frame to the next."""
        return (self.height + 1) * self.line

    @property
    def rows(self) -> int:
        return self.frames * self.frame

    @property
    def lead(self) -> int:
        """Zero rows in front of a convolution's input: the line above the first, and a pixel before it."""
        return self.line + 1

    @property
    def past(self) -> int:
        """Rows of the frames kept from the chunk before."""
        return HISTORY * self.frame

    def clip(self, y_RC: Tensor) -> Tensor:
        """View the rows as a clip [T, H, W, C]."""
        return y_RC.view(self.frames, self.height + 1, self.line, -1)[:, : self.height, : self.width]

    def padded(self, y_RC: Tensor) -> Tensor:
        """View the rows with their zeros, [T, H + 1, W + 1, C]."""
        return y_RC.view(self.frames, self.height + 1, self.line, -1)

    def input(self, channels: int, like: Tensor, past_RC: Tensor | None) -> Tensor:
        """Allocate a convolution's input [lead + past + rows + 2, C], all but `rows` filled."""
        x_RC = like.new_empty(self.lead + self.past + self.rows + 2, channels)
        x_RC[: self.lead].zero_()
        x_RC[-2:].zero_()
        if past_RC is None:
            x_RC[self.lead : self.lead + self.past].zero_()
        else:
            x_RC[self.lead : self.lead + self.past].copy_(past_RC)
        return x_RC

    def present(self, x_RC: Tensor) -> Tensor:
        """View the `rows` of a convolution's input that are this chunk's."""
        return x_RC[self.lead + self.past : -2]

    def kept(self, x_RC: Tensor) -> Tensor:
        """Copy a convolution's last two frames, for the next chunk."""
        return x_RC[-2 - self.past : -2].clone()


def flatten(clip_THWC: Tensor) -> tuple[Grid, Tensor]:
    """Lay out a clip: its grid and rows [T * (H + 1) * (W + 1), C]."""
    frames, height, width, channels = clip_THWC.shape
    return Grid(frames, height, width), F.pad(clip_THWC, (0, 0, 0, 1, 0, 1)).reshape(-1, channels)


class CausalConv:
    """A causal 3x3x3 convolution over grids, with the weights of a Conv3d [N, C, 3, 3, 3]."""

    def __init__(self, conv: torch.nn.Conv3d) -> None:
        assert conv.bias is not None
        self.in_channels = -(-conv.in_channels // 8) * 8  # rows of whole 16 bytes
        self.bias_N = conv.bias
        self._on_gpu = conv.weight.is_cuda
        if self._on_gpu:
            from encode.kernels import pack_weight

            self._weight = pack_weight(conv.weight, self.in_channels)
        else:
            self._weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, self.in_channels - conv.in_channels))

    def __call__(self, grid: Grid, x_RC: Tensor, residual_RN: Tensor | None = None) -> Tensor:
        """Convolve a filled `grid.input`: rows [R, N], plus the residual; zero where there is no pixel."""
        if self._on_gpu:
            from encode.kernels import conv

            return conv(
                x_RC,
                self._weight,
                self.bias_N,
                rows=grid.rows,
                line=grid.line,
                frame=grid.frame,
                height=grid.height,
                width=grid.width,
                residual_RN=residual_RN,
            )
        whole = Grid(grid.frames + HISTORY, grid.height, grid.width)
        clip_BCTHW = whole.clip(x_RC[grid.lead : -2]).permute(3, 0, 1, 2).unsqueeze(0)
        y_BNTHW = F.conv3d(clip_BCTHW, self._weight, self.bias_N, padding=(0, 1, 1))
        if residual_RN is not None:
            y_BNTHW = y_BNTHW + grid.clip(residual_RN).permute(3, 0, 1, 2)
        return flatten(y_BNTHW[0].permute(1, 2, 3, 0))[1]


def norm_silu(y_RC: Tensor, gamma_C: Tensor, out_RC: Tensor) -> None:
    """Write SiLU(RMS norm of y) to `out_RC`; zeros stay zeros, so the layout's padding survives."""
    if y_RC.is_cuda:
        from encode.kernels import norm_silu

        norm_silu(y_RC, gamma_C, out_RC)
    else:
        out_RC.copy_(F.silu(F.normalize(y_RC, dim=1) * y_RC.shape[1] ** 0.5 * gamma_C))
