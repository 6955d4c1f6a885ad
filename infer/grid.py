"""Results side by side in one MP4, each under its label; read from their files frame by frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.video import Frames, iterate_frames, shorten, video_writer

_LABEL_HEIGHT = 20
MOST_CELLS = 64
"""More would be too small to see, and every cell is a decoder."""


def write_grid(
    path: Path, cells: Sequence[tuple[str, Path]], fps: float, *, together: int = 1, cell_width: int = 320
) -> None:
    """Write a grid of videos, near square, in order by rows; a video that ends early keeps its last frame.

    cells: (label, video), 64 at most are shown. together: runs of that many cells stay in a row. cell_width: pixels
    a frame is fitted into, never enlarged beyond the widest video; heights follow the tallest. fps: of the grid, and
    of all its videos.
    """
    shown = cells[:MOST_CELLS]
    sizes = [next(iterate_frames(video)).shape[:2] for _, video in shown]
    width = _even(min(cell_width, max(w for _, w in sizes)))
    height = _even(max(round(h * min(1.0, width / w)) for h, w in sizes)) + _LABEL_HEIGHT
    columns = together * math.ceil(math.sqrt(len(shown)) / together)
    rows = math.ceil(len(shown) / columns)
    font = ImageFont.load_default(size=13)
    canvas = Image.new("RGB", (columns * width, rows * height), "black")
    draw = ImageDraw.Draw(canvas)
    places = [(index % columns * width, index // columns * height) for index in range(len(shown))]
    for (label, _), (left, top) in zip(shown, places, strict=True):
        draw.text((left + 4, top + 3), shorten(label, font, width - 8), fill="white", font=font)
    streams: list[Iterator[Frames] | None] = [iterate_frames(video) for _, video in shown]
    with video_writer(path, fps) as write:
        while True:
            frames = [next(stream, None) if stream is not None else None for stream in streams]
            streams = [stream if frame is not None else None for stream, frame in zip(streams, frames, strict=True)]
            if not any(streams):
                return
            for frame, (left, top) in zip(frames, places, strict=True):
                if frame is not None:
                    canvas.paste(_fitted(frame, width), (left, top + _LABEL_HEIGHT))
            write(np.asarray(canvas)[None])


def _fitted(frame_HWC: Frames, width: int) -> Image.Image:
    image = Image.fromarray(frame_HWC)
    if image.width <= width:
        return image
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BOX)


def _even(size: int) -> int:
    return size + size % 2
