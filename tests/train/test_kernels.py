"""The trainer's Triton kernel computes what PyTorch computes; here in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from train.kernels import add_low_rank

torch.manual_seed(0)
for rows, columns, rank in [(5, 16, 4), (130, 144, 32), (17, 300, 96)]:
    y, low, up = torch.randn(rows, columns), torch.randn(rows, rank), torch.randn(columns, rank)
    expected = y + low @ up.t()
    other = y.clone()
    add_low_rank(y, low, up)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    add_low_rank(other, low, up.t().contiguous().t())
    torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-4)
print("same")
"""


def test_the_kernel_computes_what_pytorch_computes():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"
