"""The encoder's Triton kernels compute what PyTorch computes; here in Triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
import torch.nn.functional as F
from encode import kernels
from encode.grid import Grid

torch.manual_seed(0)
for channels, outputs, frames, height, width, with_residual in [
    (8, 24, 2, 5, 7, False), (24, 24, 1, 3, 6, True), (8, 96, 1, 3, 4, True),
]:
    grid = Grid(frames, height, width)
    clip = torch.randn(frames + 2, height, width, channels)
    weight, bias = torch.randn(outputs, channels, 3, 3, 3), torch.randn(outputs)
    residual = torch.randn(grid.rows, outputs) if with_residual else None
    x = grid.input(channels, clip, F.pad(clip[:2], (0, 0, 0, 1, 0, 1)).reshape(-1, channels))
    grid.present(x).copy_(F.pad(clip[2:], (0, 0, 0, 1, 0, 1)).reshape(-1, channels))
    y = kernels.conv(
        x, kernels.pack_weight(weight, channels), bias, rows=grid.rows, line=grid.line, frame=grid.frame,
        height=height, width=width, residual_RN=residual,
    )
    expected = F.conv3d(clip.permute(3, 0, 1, 2)[None], weight, bias, padding=(0, 1, 1))[0].permute(1, 2, 3, 0)
    if residual is not None:
        expected = expected + grid.clip(residual)
    torch.testing.assert_close(grid.clip(y), expected, rtol=1e-4, atol=1e-4)
    assert not grid.padded(y)[:, height:].any() and not grid.padded(y)[:, :, width:].any()

y, gamma = torch.randn(70, 24), torch.randn(24)
y[3] = 0
out = torch.full_like(y, torch.nan)
kernels.norm_silu(y, gamma, out)
torch.testing.assert_close(out, F.silu(F.normalize(y, dim=1) * 24**0.5 * gamma), rtol=1e-5, atol=1e-5)
assert not out[3].any()
print("same")
"""


def test_kernels_compute_what_pytorch_computes() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"
