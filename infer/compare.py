"""PSNR and SSIM of a video against its ground truth, over 8-bit RGB.

Own code: the libraries that have both bring SciPy or a training framework, and FFmpeg's SSIM uses blocks where the
published measure has a Gaussian window. Held to scikit-image's values by a test.
"""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from infer.request import Request
from infer.video import Frames, iterate_frames
from manifests.errors import UsageError

_SIGMA = 1.5
_RADIUS = 5  # 11 x 11 windows, as published
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def compare_videos(video: Path, ground_truth: Path) -> tuple[float | None, float]:
    """(PSNR in dB, SSIM) of the video against as many first frames of the ground truth, stretched to its size.

    PSNR is of the mean squared error over all frames, None if they are equal; SSIM is the mean over the frames.
    """
    errors, similarities = [], []
    for frame_HWC, true_HWC in zip(iterate_frames(video), iterate_frames(ground_truth), strict=False):
        true = _stretched(true_HWC, frame_HWC.shape[1], frame_HWC.shape[0])
        errors.append(float(((frame_HWC.astype(np.float64) - true) ** 2).mean()))
        similarities.append(ssim(frame_HWC, true))
    error = sum(errors) / len(errors)
    psnr = 10 * math.log10(255**2 / error) if error else None
    return psnr, sum(similarities) / len(similarities)


def ssim(frame_HWC: Frames, other_HWC: Frames) -> float:
    """Structural similarity of two uint8 RGB frames (Wang et al. 2004), the mean over pixels and channels.

    Gaussian windows of sigma 1.5, 11 x 11, inside the frame; both sides must be 11 pixels or more.
    """
    a, b = (torch.from_numpy(frame.astype(np.float64)).permute(2, 0, 1)[:, None] for frame in (frame_HWC, other_HWC))
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    above = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    below = (mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)
    return float((above / below).mean())


def check_ground_truth(request: Request) -> None:
    """Raise UsageError unless the request's ground truth, if it has one, has as many frames as the video will."""
    if request.ground_truth is None:
        return
    try:
        with av.open(str(request.ground_truth)) as container:
            stream = container.streams.video[0]
            count = stream.frames or sum(1 for _ in container.decode(stream))
    except (OSError, IndexError, av.FFmpegError) as error:
        raise UsageError(f"{request.name}: ground truth {request.ground_truth}: cannot read this video") from error
    if count < request.num_frames:
        raise UsageError(
            f"{request.name}: ground truth {request.ground_truth} has {count} frames, the video will have "
            f"{request.num_frames}; give a longer one or fewer frames"
        )


def _blurred(x_N1HW: Tensor) -> Tensor:
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    return F.conv2d(F.conv2d(x_N1HW, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _stretched(frame_HWC: Frames, width: int, height: int) -> Frames:
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    return np.asarray(Image.fromarray(frame_HWC).resize((width, height), Image.Resampling.BILINEAR))
