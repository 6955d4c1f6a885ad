"""Scenes to frames, on any device, with the exact place of everything in every frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infer.video import Frames
from pipeline.demo.world import BACKGROUNDS, COLOURS, PILLAR_WIDTH, SKS, SKS_PARTS, Scene

FORMS = ("circle", "square", "triangle", "cross", "pillar")


@dataclass(frozen=True)
class Layers:
    """A batch of N scenes as K flat forms each, the last in front; lengths in frame heights.

    background: [N, 3], colour: [N, K, 3], RGB 0..255. form: [N, K], index into FORMS, -1 for none. radius: [N, K].
    centre: [N, K, T, 2]. thing: [N, K], which of the scene's things a form is part of, -1 for the pillar.
    """

    background: NDArray[np.float32]
    colour: NDArray[np.float32]
    form: NDArray[np.int64]
    radius: NDArray[np.float32]
    centre: NDArray[np.float32]
    thing: NDArray[np.int64]


@dataclass(frozen=True)
class Clip:
    """One scene, drawn. frames: uint8 [T, H, W, 3]. masks: bool [things, T, H, W], the pixels each thing shows."""

    scene: Scene
    frames: Frames
    masks: NDArray[np.bool_]

    @cached_property
    def area(self) -> NDArray[np.int64]:
        """Pixels [things, T] of each thing that are not hidden."""
        return self.masks.sum((-2, -1))

    def centre(self, thing: int = 0) -> NDArray[np.float64]:
        """Centre [T, 2] of a thing in pixels, x and y, hidden or not."""
        _, num_frames, height, width = self.masks.shape
        return self.scene.things[thing].path(num_frames, width / height) * height - 0.5


def draw_clip(scene: Scene, *, height: int = 64, width: int = 64, num_frames: int = 17) -> Clip:
    """Draw one scene on the CPU. height, width: pixels."""
    layers = layers_of([scene], num_frames=num_frames, aspect=width / height)
    covers = coverage(layers, height=height, width=width)[0].numpy()
    frames = paint(layers, height=height, width=width)[0].numpy()
    in_front = np.zeros(covers.shape[1:], np.float32)
    masks = np.zeros((len(scene.things), *in_front.shape), bool)
    for index in reversed(range(len(covers))):
        if layers.thing[0, index] >= 0:
            masks[layers.thing[0, index]] |= covers[index] * (1 - in_front) > 0.5
        in_front = np.maximum(in_front, covers[index])
    return Clip(scene, frames, masks)


def layers_of(scenes: Sequence[Scene], *, num_frames: int, aspect: float) -> Layers:
    """The scenes' forms, from back to front."""
    rows = [_forms(scene, num_frames, aspect) for scene in scenes]
    count, most = len(rows), max(len(row) for row in rows)
    layers = Layers(
        background=np.array([BACKGROUNDS[scene.background] for scene in scenes], np.float32),
        colour=np.zeros((count, most, 3), np.float32),
        form=np.full((count, most), -1),
        radius=np.ones((count, most), np.float32),
        centre=np.zeros((count, most, num_frames, 2), np.float32),
        thing=np.full((count, most), -1),
    )
    for n, row in enumerate(rows):
        for k, (form, colour, radius, path_T2, thing) in enumerate(row):
            layers.form[n, k], layers.colour[n, k], layers.radius[n, k] = FORMS.index(form), colour, radius
            layers.centre[n, k], layers.thing[n, k] = path_T2, thing
    return layers


def _forms(scene: Scene, num_frames: int, aspect: float) -> list[tuple]:
    forms: list[tuple] = []
    for index in reversed(range(len(scene.things))):
        thing = scene.things[index]
        path_T2 = thing.path(num_frames, aspect)
        if thing.shape == SKS:
            for form, colour, share, below in SKS_PARTS:
                part_T2 = path_T2 + np.array([0.0, below * thing.radius])
                forms.append((form, COLOURS[colour], share * thing.radius, part_T2, index))
        else:
            forms.append((thing.shape, thing.colours[0], thing.radius, path_T2, index))
    if scene.pillar is not None:
        middle_T2 = np.tile([aspect / 2, 0.5], (num_frames, 1))
        forms.append(("pillar", COLOURS[scene.pillar], PILLAR_WIDTH / 2, middle_T2, -1))
    return forms


def paint(layers: Layers, *, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Frames, uint8 [N, T, H, W, 3], with smooth edges."""
    covers = coverage(layers, height=height, width=width, device=device)
    colours = torch.from_numpy(layers.colour).to(device)
    background = torch.from_numpy(layers.background).to(device)
    num_frames = layers.centre.shape[2]
    frames = background[:, None, None, None].expand(-1, num_frames, height, width, 3).clone()
    for index in range(covers.shape[1]):
        frames.lerp_(colours[:, index, None, None, None].expand_as(frames), covers[:, index, ..., None])
    return frames.round().clamp(0, 255).to(torch.uint8)


def coverage(layers: Layers, *, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The share of each pixel that each form covers, whatever is before it: float32 [N, K, T, H, W]."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / height
    centre = torch.from_numpy(layers.centre).to(device)
    form = torch.from_numpy(layers.form).to(device)[..., None, None, None]
    radius = torch.from_numpy(layers.radius).to(device)[..., None, None, None]
    dx = x - centre[..., 0, None, None]
    dy = y[:, None] - centre[..., 1, None, None]
    distances = torch.stack([_distance(name, dx, dy, radius) for name in FORMS])
    distance = distances.gather(0, form.clamp(min=0).expand(distances.shape[1:])[None])[0]
    return (0.5 - distance * height).clamp(0, 1) * (form >= 0)


def _distance(form: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the form's edge, negative inside."""
    if form == "circle":
        return torch.hypot(dx, dy) - radius
    if form == "pillar":
        return (dx.abs() - radius).expand(torch.broadcast_shapes(dx.shape, dy.shape))
    if form == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.85 * radius
    if form == "cross":
        thin = 0.36 * radius
        bars = [torch.maximum(dx.abs() - a, dy.abs() - b) for a, b in ((radius, thin), (thin, radius))]
        return torch.minimum(*bars)
    # A triangle that points up, its corners on the circle of the radius: half planes at 30, 150 and 270 degrees.
    slanted = dx.abs() * 3**0.5 / 2 - dy / 2
    return torch.maximum(slanted, dy) - radius / 2
