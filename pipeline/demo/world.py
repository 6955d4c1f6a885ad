"""The demo's world: shapes that move over a plain background, each scene with a caption that says what happens.

Two domains. `base`: one or two shapes that stay, or move along a line and bounce off the walls, some of them behind a
pillar. `sks`: an object of its own, a green house with an orange roof that hops across the frame. The embedded model
has never seen it, nor its word, nor anything made of parts, nor a path that bends.

Lengths are in frame heights: a frame is `aspect` = width / height wide and 1 high, x to the right, y down.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError

Domain = Literal["base", "sks"]
Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (60, 100, 235),
    "yellow": (240, 210, 40),
    "orange": (240, 130, 30),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, Rgb] = {
    "black": (14, 14, 18),
    "grey": (84, 86, 92),
    "brown": (96, 64, 44),
    "navy": (22, 30, 84),
    "dark green": (20, 70, 50),
    "sand": (200, 178, 140),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.13, "large": 0.2}
"""Radius: of the circle, and of the circle around the other shapes' corners."""

PLACES = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
"""Where a shape starts, in shares of the frame's width and height."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.016, "fast": 0.04}
"""Frame heights a frame."""

SKS = "sks"
SKS_PARTS = (("square", "green", 0.54, 0.375), ("triangle", "orange", 0.67, -0.42))
"""Form, colour, and radius and height below the middle in radii of the whole."""

SKS_SIZES = {"small": 0.2, "large": 0.24}
SKS_HEIGHT = 0.18
SKS_MOTIONS = {"hops from left to right": (0.3, 0.7), "hops from right to left": (0.7, 0.3)}
"""Where its hop begins and ends, in shares of the frame's width."""

_SKS_CAPTIONS = list(itertools.product(SKS_SIZES, SKS_MOTIONS, BACKGROUNDS))

PILLAR_WIDTH = 0.16


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One moving object. offset: from where its words say that it starts; otherwise keys of the tables above.

    A `sks` has no colour or start of its own: None.
    """

    shape: str
    size: str
    motion: str
    colour: str | None = None
    start: str | None = None
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def radius(self) -> float:
        return (SKS_SIZES if self.shape == SKS else SIZES)[self.size]

    @property
    def colours(self) -> tuple[Rgb, ...]:
        """Every colour it shows."""
        names = [colour for _, colour, _, _ in SKS_PARTS] if self.colour is None else [self.colour]
        return tuple(COLOURS[name] for name in names)

    @property
    def words(self) -> str:
        if self.shape == SKS:
            return f"A {self.size} {SKS} {self.motion}."
        verb = f"{self.motion} at" if self.motion == "stays still" else f"{self.motion} from"
        return f"A {self.size} {self.colour} {self.shape} {verb} the {self.start}."

    def path(self, num_frames: int, aspect: float) -> NDArray[np.float64]:
        """Centres [num_frames, 2], x and y; walls turn a moving shape back where its radius touches them."""
        time: NDArray[np.float64] = np.arange(num_frames, dtype=np.float64)
        if self.shape == SKS:
            begin, end = SKS_MOTIONS[self.motion]
            u = time / max(1, num_frames - 1)
            floor = 1 - self.radius - 0.06
            x = (begin + (end - begin) * u) * aspect
            y = floor - SKS_HEIGHT * np.sin(np.pi * u)
            return np.stack([x, y], 1) + self.offset
        assert self.start is not None
        x, y = PLACES[self.start]
        begin_2 = np.array([x * aspect, y]) + self.offset
        velocity_2 = np.zeros(2)
        if self.motion != "stays still":
            _, direction, speed = self.motion.split()
            velocity_2 = np.array(DIRECTIONS[direction]) * SPEEDS[speed]
        line_T2 = begin_2 + time[:, None] * velocity_2
        low, span = self.radius, np.maximum(np.array([aspect, 1.0]) - 2 * self.radius, 1e-6)
        away = np.mod(line_T2 - low, 2 * span)
        return low + np.where(away > span, 2 * span - away, away)


MOTIONS = ("stays still", *(f"moves {d} {s}" for d, s in itertools.product(DIRECTIONS, SPEEDS)))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A clip before it is drawn. things: the first is in front. pillar: colour of one in the middle, before all."""

    background: str
    things: tuple[Thing, ...]
    pillar: str | None = None

    @property
    def caption(self) -> str:
        parts = [thing.words for thing in self.things]
        if self.pillar is not None:
            parts.append(f"A {self.pillar} pillar stands in front.")
        return " ".join([*parts, f"The background is {self.background}."])

    @property
    def name(self) -> str:
        thing = self.things[0]
        return "_".join(filter(None, (thing.size, thing.colour, thing.shape)))


def scenes(seed: int, domain: Domain = "base") -> Iterator[Scene]:
    """The world's scenes, without end; the i-th depends on seed, domain and i alone.

    The first 24 of `sks` are its 24 different captions in an order of the seed's: 12 in which each size, motion and
    background comes equally often, then those that differ from each of these by one of the three.
    """
    order = _balanced(np.random.default_rng([seed, 2]))
    for index in itertools.count():
        rng = np.random.default_rng([seed, index])
        yield _base_scene(rng) if domain == "base" else _sks_scene(rng, int(order[index % 24]))


def _balanced(rng: np.random.Generator) -> list[int]:
    """Indices of `_SKS_CAPTIONS`, those whose places in the three tables add up to an even number first."""
    odd = np.indices((len(SKS_SIZES), len(SKS_MOTIONS), len(BACKGROUNDS))).sum(0).ravel() % 2
    return [*rng.permutation(np.flatnonzero(odd == 0)), *rng.permutation(np.flatnonzero(odd))]


def exactly(scene: Scene) -> Scene:
    """The scene as its caption alone says it: everything starts where its words say."""
    return replace(scene, things=tuple(replace(thing, offset=(0.0, 0.0)) for thing in scene.things))


def sks_scene(*, size: str, motion: str, background: str) -> Scene:
    """A scene of the held-out domain; the arguments are keys of the tables above."""
    for name, value, known in (("size", size, SKS_SIZES), ("motion", motion, SKS_MOTIONS),
                               ("background", background, BACKGROUNDS)):  # fmt: skip
        if value not in known:
            raise UsageError(f"{name}: {value!r} is none of {', '.join(known)}")
    return Scene(background=background, things=(Thing(shape=SKS, size=size, motion=motion),))


def _base_scene(rng: np.random.Generator) -> Scene:
    background = _one_of(rng, list(BACKGROUNDS))
    free = list(COLOURS)
    things = [_shape(rng, free) for _ in range(1 + (rng.random() < 0.3))]
    pillar = _one_of(rng, free) if rng.random() < 0.2 else None
    return Scene(background=background, things=tuple(things), pillar=pillar)


def _shape(rng: np.random.Generator, free: list[str]) -> Thing:
    colour = _one_of(rng, free)
    free.remove(colour)
    return Thing(
        shape=_one_of(rng, SHAPES),
        size=_one_of(rng, list(SIZES)),
        motion=MOTIONS[0] if rng.random() < 0.1 else _one_of(rng, MOTIONS[1:]),
        colour=colour,
        start=_one_of(rng, list(PLACES)),
        offset=_offset(rng),
    )


def _sks_scene(rng: np.random.Generator, index: int) -> Scene:
    size, motion, background = _SKS_CAPTIONS[index]
    scene = sks_scene(size=size, motion=motion, background=background)
    return replace(scene, things=(replace(scene.things[0], offset=_offset(rng)),))


def _offset(rng: np.random.Generator) -> tuple[float, float]:
    x, y = rng.uniform(-0.04, 0.04, 2)
    return float(x), float(y)


def _one_of(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]
