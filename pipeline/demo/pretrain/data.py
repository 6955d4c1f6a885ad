"""Clips of the base domain by the thousand, drawn where they are used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.demo.draw import FORMS, Layers, layers_of, paint
from pipeline.demo.world import Scene, scenes

SIZE = 64
FRAMES = 17
LATENT_FRAMES = 5
CHUNK = 200
"""Clips drawn at once."""

_WILD_FORMS = (0.2, 0.2, 0.2, 0.3, 0.1)
"""Shares of FORMS: crosses, of which the base domain has none, come more often."""


def base_scenes(seed: int, count: int) -> list[Scene]:
    return list(itertools.islice(scenes(seed), count))


def drawn(found: Sequence[Scene], device: torch.device, *, wild: int | None = None) -> Tensor:
    """Frames of the scenes, uint8 [N, T, H, W, 3] on `device`, every other clip as H.264 would store its colours.

    wild: a seed; colours and forms are then random, as the released VAE knows more than a fine-tuning shows it.
    """
    parts = []
    for begin in range(0, len(found), CHUNK):
        layers = layers_of(found[begin : begin + CHUNK], num_frames=FRAMES, aspect=1.0)
        if wild is not None:
            layers = _wild(layers, np.random.default_rng([wild, begin]))
        frames_NTHWC = paint(layers, height=SIZE, width=SIZE, device=device)
        frames_NTHWC[::2] = halved_colour(frames_NTHWC[::2])
        parts.append(frames_NTHWC)
    return torch.cat(parts)


def _wild(layers: Layers, rng: np.random.Generator) -> Layers:
    """Random colours, half of them vivid, random forms and bent paths; half of the scenes get a form within a form."""
    count, most, num_frames, _ = layers.centre.shape
    colour = rng.uniform(0, 255, (count, most + 1, 3)).astype(np.float32)
    vivid = rng.random((count, most + 1, 1)) < 0.5
    colour = np.where(vivid, np.where(colour > 127, 235, 25) + rng.uniform(-20, 20, colour.shape), colour)
    colour = colour.astype(np.float32)
    form = np.full((count, most + 1), -1)
    form[:, 1:] = np.where(layers.form >= 0, rng.choice(len(FORMS), layers.form.shape, p=_WILD_FORMS), -1)
    front = (layers.form >= 0).sum(1)  # one past a scene's last form, which lie from the left
    radius = np.ones((count, most + 1), np.float32)
    radius[:, 1:] = layers.radius
    centre = np.zeros((count, most + 1, num_frames, 2), np.float32)
    centre[:, 1:] = layers.centre
    rows = np.arange(count)
    inner = rng.random(count) < 1 / 2
    # Forms now begin at 1: move a scene's forms down by one place and put a smaller one on the last of them.
    for n in rows[inner]:
        last = front[n]
        form[n, :last], radius[n, :last] = form[n, 1 : last + 1], radius[n, 1 : last + 1]
        centre[n, :last] = centre[n, 1 : last + 1]
        form[n, last] = rng.integers(4)
        radius[n, last] = radius[n, last - 1] * rng.uniform(0.3, 0.6)
        centre[n, last] = centre[n, last - 1]
    u = np.arange(num_frames) / max(1, num_frames - 1)
    turns, phase, angle = (rng.uniform(low, high, (count, 1)) for low, high in ((1, 8), (0, 6.3), (0, 6.3)))
    bend = rng.uniform(0, 0.25, (count, 1)) * np.sin(turns * u + phase)
    centre += np.stack([bend * np.cos(angle), bend * np.sin(angle)], -1)[:, None].astype(np.float32)
    background = rng.uniform(0, 255, (count, 3)).astype(np.float32)
    return Layers(background, colour, form, radius, centre, np.full((count, most + 1), -1))


def halved_colour(frames_NTHWC: Tensor) -> Tensor:
    """Frames with the colour of 2 x 2 pixels averaged and their brightness kept, as yuv420p keeps them."""
    rgb = frames_NTHWC.float().permute(0, 1, 4, 2, 3).flatten(0, 1)
    weights = torch.tensor([0.2126, 0.7152, 0.0722], device=rgb.device).view(1, 3, 1, 1)
    luma = (rgb * weights).sum(1, keepdim=True)
    chroma = F.interpolate(F.avg_pool2d(rgb - luma, 2), scale_factor=2, mode="bilinear")
    chroma = chroma - (chroma * weights).sum(1, keepdim=True)
    back = (luma + chroma).round().clamp(0, 255).to(torch.uint8)
    return back.unflatten(0, frames_NTHWC.shape[:2]).permute(0, 1, 3, 4, 2).contiguous()
