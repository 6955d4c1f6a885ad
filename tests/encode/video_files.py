"""Real video files whose every frame shows its own index, to check which frame was decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
NUM_FRAMES = 120
B_FRAMES = {"options": {"bf": "3", "g": "60", "x264-params": "b-pyramid=normal:scenecut=0"}}
"""Settings of a file with long groups of pictures and B-frames that refer to B-frames."""


def numbered_picture(number: int, height: int, width: int) -> np.ndarray:
    """uint8 RGB [height, width, 3]: the number in binary, as vertical bars, the lowest bit on the left."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        picture[:, left:right] = 220 if number >> bit & 1 else 30
    return picture


def numbers_of(frames: np.ndarray) -> list[int]:
    """The number each of the frames [T, height, width, 3] shows."""
    width = frames.shape[2]
    centers = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    middle = frames[:, frames.shape[1] // 2, :, :].mean(axis=-1)
    return [sum(1 << bit for bit, x in enumerate(centers) if row[x] > 125) for row in middle]


@contextmanager
def _own_scheduling() -> Iterator[None]:
    """SVT-AV1 makes the calling thread a real-time one (SCHED_FIFO, 99) if it may, and leaves it so.

    Everything started later would inherit that, and starve the machine by waiting.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_video(
    path: Path,
    num_frames: int,
    *,
    fps: int = 30,
    height: int = 64,
    width: int = 128,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times_ms: list[int] | None = None,
    rotate: float | None = None,
    mirror: bool = False,
    pictures: list[np.ndarray] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A video of numbered pictures, or of those given; `times_ms` makes its frame rate variable.

    rotate: degrees counterclockwise written into the metadata; the pictures themselves stay as they are.
    """
    with _own_scheduling(), av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if times_ms is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotate is not None:
            stream.set_display_rotation(rotate, hflip=mirror)
        for i in range(num_frames):
            picture = pictures[i] if pictures is not None else numbered_picture(i, height, width)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if times_ms is None else times_ms[i]
            frame.time_base = Fraction(1, fps) if times_ms is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """One second of a tone and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for start in range(0, 44100, 1024):
            wave = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
