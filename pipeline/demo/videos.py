"""The demo's dataset: short H.264 videos of one moving shape, each with a caption that describes it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from infer.video import Frames, write_mp4
from manifests.errors import UsageError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (12, 12, 16),
    "dark grey": (70, 72, 76),
    "sky blue": (130, 195, 235),
    "sand": (214, 190, 150),
}
SHAPES = ("circle", "square", "triangle", "diamond")
MOTIONS = {
    "slides from left to right": lambda u: (0.2 + 0.6 * u, 0.5, 1.0),
    "slides from right to left": lambda u: (0.8 - 0.6 * u, 0.5, 1.0),
    "rises from the bottom to the top": lambda u: (0.5, 0.75 - 0.5 * u, 1.0),
    "falls from the top to the bottom": lambda u: (0.5, 0.25 + 0.5 * u, 1.0),
    "moves once around a circle": lambda u: (
        0.5 + 0.25 * math.cos(2 * math.pi * u),
        0.5 + 0.25 * math.sin(2 * math.pi * u),
        1.0,
    ),
    "grows in the middle": lambda u: (0.5, 0.5, 0.5 + u),
}
"""Each maps time u in [0, 1] to the shape's centre (x, y as fractions of the frame) and relative size."""

SUPERSAMPLE = 3


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What one video shows; each field is a key of the tables above."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"A {self.colour} {self.shape} {self.motion} in front of a plain {self.background} background."

    @property
    def stem(self) -> str:
        return f"{self.colour}_{self.shape}"


def make_videos(
    folder: Path,
    *,
    num_videos: int = 12,
    seed: int = 0,
    height: int = 96,
    width: int = 160,
    num_frames: int = 33,
    fps: float = 16.0,
) -> list[Path]:
    """Write `folder/videos/<stem>.mp4` and `folder/metas/<stem>.txt`; return the videos, sorted.

    Captions all differ, and files are the same bytes for the same arguments and library versions.
    height, width: pixels, even. Raises UsageError if more videos are asked than there are different clips.
    """
    videos, metas = folder / "videos", folder / "metas"
    videos.mkdir(parents=True, exist_ok=True)
    metas.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, clip in enumerate(choose_clips(num_videos, seed)):
        path = videos / f"{index:02d}_{clip.stem}.mp4"
        write_mp4(path, render_clip(clip, height=height, width=width, num_frames=num_frames), fps)
        (metas / f"{path.stem}.txt").write_text(clip.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def choose_clips(count: int, seed: int) -> list[Clip]:
    """`count` different clips in an order that depends on `seed` alone."""
    every = list(itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS))
    if count > len(every):
        raise UsageError(f"num_videos: {count} is more than the {len(every)} different clips; ask for fewer")
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    return [
        Clip(colour=colour, shape=shape, motion=motion, background=background)
        for colour, shape, motion, background in (every[i] for i in order)
    ]


def render_clip(clip: Clip, *, height: int, width: int, num_frames: int) -> Frames:
    """The clip's frames, uint8 [num_frames, height, width, 3]."""
    frames: Frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        x, y, size = MOTIONS[clip.motion](index / max(1, num_frames - 1))
        big = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE), BACKGROUNDS[clip.background])
        centre = (x * big.width, y * big.height)
        _draw(ImageDraw.Draw(big), clip, centre, radius=0.2 * size * big.height)
        frames[index] = np.asarray(big.resize((width, height), Image.Resampling.BOX))
    return frames


def _draw(draw: ImageDraw.ImageDraw, clip: Clip, centre: tuple[float, float], radius: float) -> None:
    x, y = centre
    fill = COLOURS[clip.colour]
    if clip.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif clip.shape == "square":
        half = 0.85 * radius
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        corners, turn = {"triangle": (3, -90.0), "diamond": (4, 0.0)}[clip.shape]
        angles = [math.radians(turn + 360.0 * i / corners) for i in range(corners)]
        draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=fill)
