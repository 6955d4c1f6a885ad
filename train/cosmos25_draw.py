"""Cosmos-Predict2.5 in training: what chance decides for each visit to a sample."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch

from train.config import ObjectiveConfig


@dataclass(frozen=True)
class Draw:
    """What chance decides for one sample in one epoch.

    noise: [C, T, H, W] float32 standard normal, on the CPU. sigma: noise level in (0, 1), one for all frames.
    num_conditioning: clean latent frames at the start. drop_text: use the null context.
    """

    noise: torch.Tensor
    sigma: float
    num_conditioning: int
    drop_text: bool


def draw(seed: int, epoch: int, sample_id: str, shape: tuple[int, ...], objective: ObjectiveConfig) -> Draw:
    """Draw noise, sigma, conditioning and text dropout for one visit to a sample.

    A pure function of its arguments, computed on the CPU: rank, world size, batch size and device do not
    enter. shape: (C, T, H, W). sigma = s t / (1 + (s - 1) t) with t = sigmoid(standard normal) and s the
    objective's shift.
    """
    name = hashlib.sha256(f"{seed}/{epoch}/{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little", signed=True))
    time = torch.sigmoid(torch.randn((), generator=generator))
    sigma = objective.shift * time / (1 + (objective.shift - 1) * time)
    conditioning, dropout = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return Draw(
        noise=torch.randn(shape, generator=generator),
        sigma=float(sigma),
        num_conditioning=_pick(objective.conditioning, conditioning),
        drop_text=dropout < objective.text_dropout,
    )


def sigma_at(quantile: float, objective: ObjectiveConfig) -> float:
    """Return the sigma below which `draw` stays with probability `quantile`, in (0, 1)."""
    time = 1 / (1 + math.exp(-NormalDist().inv_cdf(quantile)))
    return objective.shift * time / (1 + (objective.shift - 1) * time)


def _pick(probabilities: Mapping[int, float], uniform: float) -> int:
    """Return the key whose slice of [0, 1) holds `uniform`; slices lie in order of key."""
    keys = sorted(key for key, probability in probabilities.items() if probability > 0)
    total = 0.0
    for key in keys:
        total += probabilities[key]
        if uniform < total:
            return key
    return keys[-1]
