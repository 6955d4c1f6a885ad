"""Model FLOP of a training step, and the share of a device's peak it reaches.

Counted: for each linear layer of the base 2 x rows x in x out forward, the same again for its input's gradient, and
once more for its weights' gradient if they train; for attention 4 x queries x keys x width forward and 2.5 times that
backward. Not counted: recomputation, the adapter's own products (about 2%), norms and other pointwise work. MFU is that
over wall time and the device's dense bfloat16 peak.
"""

from __future__ import annotations

import torch

BACKWARD_OF_LINEAR = 1.0
BACKWARD_OF_ATTENTION = 2.5

# Dense bfloat16 peaks of the data sheets, FLOP/s; longer names first, since the first match counts.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def linear_flops(rows: int, weights: int, *, trained: bool = False) -> float:
    """Forward and backward of linear layers with `weights` values in all over `rows` rows."""
    return 2.0 * rows * weights * (1 + BACKWARD_OF_LINEAR * (1 + trained))


def attention_flops(queries: int, keys: int, width: int) -> float:
    """Forward and backward of one attention, `width` being all heads together."""
    return 4.0 * queries * keys * width * (1 + BACKWARD_OF_ATTENTION)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak, FLOP/s; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


def throughput(
    flops_per_sample: float, samples_per_second: float, world: int, device: torch.device
) -> dict[str, float]:
    """Model TFLOP/s a device, GPU-seconds a sample and, where the peak is known, MFU."""
    rate = flops_per_sample * samples_per_second / world
    speed = {"tflops_per_device": rate / 1e12, "device_seconds_per_sample": world / samples_per_second}
    peak = peak_flops(device)
    return speed if peak is None else speed | {"mfu": rate / peak}
