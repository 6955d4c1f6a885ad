"""What a video shows, told from its pixels: is the object there, in its colours, where it should be?

Nothing here knows of models. A pixel belongs to an object if, of all the world's colours, one of the object's is
nearest and near enough; what is measured of those pixels is compared with the clip's exact ground truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from infer.video import Frames
from pipeline.demo.draw import Clip
from pipeline.demo.world import BACKGROUNDS, COLOURS, Thing

NEAR = 110.0
"""Farthest a pixel's RGB may be from the colour it counts as; half of what separates most of the world's colours."""

_AREA = (0.5, 1.8)
"""An object that is there has so many times its true area."""

_COLOUR_SHARE = 0.35
"""... and so much, at least, of the true area of each of its colours."""

_PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float64)


@dataclass(frozen=True)
class Measured:
    """appears: share of frames, 0 to 1, in which the object is there. colour: mean distance of its pixels' RGB from the
    truth, 0 to 441; NaN if it is nowhere. place: mean distance of its middle from the truth in pixels; half the frame's
    diagonal for a frame without it. psnr: dB over 8-bit RGB against the ground truth, infinite if equal.
    """

    appears: float
    colour: float
    place: float
    psnr: float


def measure(frames_THWC: Frames, truth: Clip, *, thing: int = 0, first: int = 0) -> Measured:
    """Compare a video with its ground truth. first: frame to begin at, where earlier ones were given.

    Frames in which the truth hides most of the object are left out of `appears`, `colour` and `place`.
    """
    made, true = frames_THWC[first:], truth.frames[first:]
    if made.shape != true.shape:
        raise ValueError(f"a video of {made.shape} cannot be compared with a ground truth of {true.shape}")
    seen = truth.area[thing, first:] > 0.6 * truth.area[thing].max()
    there, colours, places = [], [], []
    for frame_HWC, true_HWC in zip(made[seen], true[seen], strict=True):
        found, expected = (_find(frame, truth.scene.things[thing]) for frame in (frame_HWC, true_HWC))
        there.append(_is_there(found, expected))
        if not len(found.places):
            places.append(math.hypot(*frame_HWC.shape[:2]) / 2)
            continue
        places.append(float(np.hypot(*(found.places.mean(0) - expected.places.mean(0)))))
        colours.append(float(np.linalg.norm(found.colour - expected.colour)))
    error = float(((made.astype(np.float64) - true) ** 2).mean())
    return Measured(
        appears=float(np.mean(there)),
        colour=float(np.mean(colours)) if colours else math.nan,
        place=float(np.mean(places)),
        psnr=10 * math.log10(255**2 / error) if error else math.inf,
    )


def edge_agreement(frames_THWC: Frames, truth_THWC: Frames, *, tolerance: float = 1.5) -> float:
    """F1, 0 to 1, of one video's edges against another's of the same size; tolerance: pixels.

    Precision is the share of the video's edge pixels that have one of the truth's that near, recall the reverse. 0 if
    the video has no edges at all.
    """
    near = total = found = sought = 0
    for made_HW, true_HW in zip(map(_edges, frames_THWC), map(_edges, truth_THWC), strict=True):
        near += int((made_HW & (_distance_to(true_HW) <= tolerance)).sum())
        found += int((true_HW & (_distance_to(made_HW) <= tolerance)).sum())
        total, sought = total + int(made_HW.sum()), sought + int(true_HW.sum())
    precision, recall = near / max(1, total), found / max(1, sought)
    return 2 * precision * recall / (precision + recall) if near and found else 0.0


def _edges(frame_HWC: Frames) -> NDArray[np.bool_]:
    return cv2.Canny(frame_HWC, 100, 200).astype(bool)


def _distance_to(mask_HW: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Of each pixel to the nearest one of the mask, in pixels; a mask of nothing is far away."""
    if not mask_HW.any():
        return np.full(mask_HW.shape, np.inf, np.float32)
    return np.asarray(cv2.distanceTransform((~mask_HW).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))


@dataclass(frozen=True)
class _Found:
    """places: [pixels, 2], x and y. areas: pixels of each of the object's colours. colour: their mean RGB [3]."""

    places: NDArray[np.float64]
    areas: NDArray[np.int64]
    colour: NDArray[np.float64]


def _find(frame_HWC: Frames, thing: Thing) -> _Found:
    pixels_HWC = frame_HWC.astype(np.float64)
    distance_HWP = np.linalg.norm(pixels_HWC[..., None, :] - _PALETTE, axis=-1)
    nearest_HW = np.where(distance_HWP.min(-1) < NEAR, distance_HWP.argmin(-1), -1)
    masks = [nearest_HW == _index(colour) for colour in thing.colours]
    mask_HW = np.any(masks, 0)
    rows, columns = np.nonzero(mask_HW)
    colour = pixels_HWC[mask_HW].mean(0) if mask_HW.any() else np.full(3, np.nan)
    return _Found(np.stack([columns, rows], 1).astype(np.float64), np.array([m.sum() for m in masks]), colour)


def _index(colour: tuple[int, int, int]) -> int:
    return int((np.array(colour) == _PALETTE).all(-1).argmax())


def _is_there(found: _Found, expected: _Found) -> bool:
    ratio = found.areas.sum() / max(1, expected.areas.sum())
    return bool(_AREA[0] <= ratio <= _AREA[1] and (found.areas >= _COLOUR_SHARE * expected.areas).all())
