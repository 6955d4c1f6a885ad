"""Aspect-preserving resize into a fixed size: where the video lies in it, and the mask of what is not the video."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def content_box(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a picture scaled to fit a target, centred."""
    scale = min(target_height / height, target_width / width)
    inner_height = min(target_height, max(1, int(scale * height + 0.5)))
    inner_width = min(target_width, max(1, int(scale * width + 0.5)))
    return (target_height - inner_height) // 2, (target_width - inner_width) // 2, inner_height, inner_width


def padding_of(box: Sequence[int], target_height: int, target_width: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) pixels around a box."""
    top, left, height, width = box
    return top, target_height - top - height, left, target_width - left - width


def reflect(picture_HWC: npt.NDArray[np.uint8], box: Sequence[int]) -> None:
    """Fill what lies outside the box with the box's reflection, in place."""
    height, width = picture_HWC.shape[:2]
    top, bottom, left, right = padding_of(box, height, width)
    if not any((top, bottom, left, right)):
        return
    inner = picture_HWC[top : height - bottom, left : width - right]
    picture_HWC[...] = np.pad(inner, ((top, bottom), (left, right), (0, 0)), mode="reflect")


def latent_mask(padding: Sequence[int] | None, height: int, width: int, stride: int) -> npt.NDArray[np.float32]:
    """1 where a latent's first pixel is padding, 0 elsewhere: [height, width] in latent pixels of `stride` pixels.

    The first pixel is what nearest resizing of the pixels' mask takes, as diffusers' models do.
    """
    mask: npt.NDArray[np.float32] = np.ones((height * stride, width * stride), dtype=np.float32)
    top, bottom, left, right = padding or (0, 0, 0, 0)
    mask[top : height * stride - bottom, left : width * stride - right] = 0
    return mask[::stride, ::stride].copy()
