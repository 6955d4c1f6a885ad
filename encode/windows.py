"""Which frames of a video become samples. Pure functions of frame times and settings; no video is opened.

A *target frame* is a frame of the video as seen at the target fps. Target frame i is the source frame whose
presentation time is nearest to `start + i / fps` seconds, counted from the video's first presented frame; between
two equally near ones, to 2 ms, it is the earlier. Without a target fps the target frames are the source frames
themselves. A *window* is `num_frames` consecutive target frames and is named by the index of the first one.

The planner and the decoder both call `target_frames`, so they cannot disagree about which frames a window holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from manifests.errors import LatentlineError

if TYPE_CHECKING:
    from encode.config import WindowsConfig

# Matroska rounds times to milliseconds: a frame that close before `start` or `end` is at it, and a tie between two
# frames stays one. So the container of a video does not change which frames are taken.
_ROUNDING_SECONDS = 1e-3
_FLOAT_SECONDS = 1e-6


class TooShort(LatentlineError):
    """The video, or the part of it asked for, has fewer target frames than one window."""


def target_frames(
    frame_times: npt.NDArray[np.float64],
    fps: float | None,
    start: float | None = None,
    end: float | None = None,
) -> npt.NDArray[np.int64]:
    """The index of the source frame that is each target frame, shape [num_target_frames], ascending.

    frame_times: seconds of each presented frame from the first one, ascending; variable rates are fine.
    fps: target frames a second, or None for every source frame.
    start, end: the part of the video to use, in seconds, end exclusive; an end past the video is its end.

    The video's last frame stands for times up to half a mean frame duration after its own, never for later ones.
    """
    first = 0.0 if start is None else start
    stop = np.inf if end is None else end - _ROUNDING_SECONDS
    if fps is None:
        inside = (frame_times >= first - _ROUNDING_SECONDS) & (frame_times < stop)
        return np.flatnonzero(inside).astype(np.int64)
    if len(frame_times) == 0:
        return np.zeros(0, dtype=np.int64)
    half_frame = frame_times[-1] / (len(frame_times) - 1) / 2 if len(frame_times) > 1 else 0.0
    last = min(frame_times[-1] + half_frame + _FLOAT_SECONDS, stop)
    count = max(0, int(np.floor((last - first) * fps)) + 1)
    if count > 0 and first + (count - 1) / fps >= stop:
        count -= 1
    times = first + np.arange(count) / fps
    right = np.clip(np.searchsorted(frame_times, times), 1, max(1, len(frame_times) - 1))
    left = right - 1
    right = np.minimum(right, len(frame_times) - 1)
    nearer_right = frame_times[right] - times < times - frame_times[left] - 2 * _ROUNDING_SECONDS
    return np.where(nearer_right, right, left).astype(np.int64)


def num_target_frames(
    frame_times: npt.NDArray[np.float64],
    fps: float | None,
    start: float | None = None,
    end: float | None = None,
) -> int:
    """How many target frames there are; the arguments are those of `target_frames`."""
    return len(target_frames(frame_times, fps, start, end))


def plan_windows(
    num_target_frames: int,
    num_frames: int,
    windows: WindowsConfig,
    source_hash: str,
    fps: float | None = None,
) -> list[int]:
    """First target frames of the windows of one video, ascending and distinct.

    num_target_frames: of the video. num_frames: of a window.
    source_hash: names the video's bytes; random windows depend on it and on `windows.seed` alone, and asking for
        more of them keeps the ones already drawn.
    fps: only for the message of the error.

    `uniform` holds the first and the last possible window (the first alone when count is 1). A video with fewer
    possible windows than `count` gives all of them. Raises TooShort when not even one window fits.
    """
    last = num_target_frames - num_frames
    if last < 0:
        rate = "at its own rate" if fps is None else f"at {fps:g} fps"
        raise TooShort(f"too short: {num_target_frames} frames {rate}, a window needs {num_frames}")
    if windows.mode == "head":
        return [0]
    if windows.mode == "slide":
        return list(range(0, last + 1, windows.stride or num_frames))
    if windows.count > last:
        return list(range(last + 1))
    if windows.mode == "uniform":
        steps = max(1, windows.count - 1)
        return [(2 * i * last + steps) // (2 * steps) for i in range(windows.count)]
    chosen: set[int] = set()
    for draw in _draws(f"{source_hash}:{windows.seed}"):
        chosen.add(draw % (last + 1))
        if len(chosen) == windows.count:
            break
    return sorted(chosen)


def _draws(key: str) -> Iterator[int]:
    """Endless 64-bit numbers that depend on the key alone, on every machine and version."""
    counter = 0
    while True:
        yield int.from_bytes(hashlib.sha256(f"{key}:{counter}".encode()).digest()[:8], "big")
        counter += 1
