"""Cosmos-Transfer2.5 in stage 1: what Predict has, and hints, through the same VAE.

Mirrors diffusers' `Cosmos2_5_TransferPipeline`. Contexts are projected for the base and for the controlnet, which has a
`crossattn_proj` of its own: once where the two are equal, else side by side, [L, 2 D], the base's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_transfer import DEFAULT_NEGATIVE_PROMPT

from encode import cosmos25
from encode.config import EncodeConfig
from encode.cosmos25 import (
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    VideoDecoder,
    VideoEncoder,
    accelerate_vae,
    check_sizes,
    latents_parts,
)
from manifests.config import ModelConfig
from manifests.fingerprint import component_folder, weights_digest
from manifests.hints import POLICY, is_blank

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "SPATIAL_STRIDE",
    "TEMPORAL_STRIDE",
    "HintEncoder",
    "TextEncoder",
    "VideoDecoder",
    "VideoEncoder",
    "accelerate_vae",
    "check_geometry",
    "context_parts",
    "entry_shape",
    "hint_parts",
    "latents_parts",
]


def check_geometry(config: EncodeConfig) -> None:
    """Raise `UsageError` unless height and width are divisible by 16 and num_frames is 4k+1."""
    check_sizes(config)


def context_parts(model: ModelConfig, config: EncodeConfig) -> dict[str, Any]:
    """Everything about the producer of contexts that determines their bytes, both projections included."""
    control = None
    if config.text == "projected":
        control = weights_digest(component_folder(model, "controlnet"), "crossattn_proj")
    return cosmos25.context_parts(model, config) | {"control_projection": control}


def hint_parts(model: ModelConfig, config: EncodeConfig) -> dict[str, Any]:
    """Everything about the producer of hints that determines their bytes, but their kinds and parameters."""
    return latents_parts(model, config) | {"hints": POLICY}


def entry_shape(kind: str, model: ModelConfig, config: EncodeConfig) -> tuple[int, ...]:
    """Shape of an entry's tensor: latents and hint [C, T, H, W], context [L, D] or [L, 2 D]."""
    shape = cosmos25.entry_shape("latents" if kind == "hint" else kind, model, config)
    return (shape[0], 2 * shape[1]) if kind == "context" and _has_two_projections(model, config) else shape


def _has_two_projections(model: ModelConfig, config: EncodeConfig) -> bool:
    if config.text == "raw":
        return False
    folders: list[Path] = [component_folder(model, name) for name in ("transformer", "controlnet")]
    first, second = (weights_digest(folder, "crossattn_proj") for folder in folders)
    return first != second


class HintEncoder(VideoEncoder):
    """The VAE for hints: one that is black throughout becomes the latent that is zero once it is normalised."""

    def encode(self, frames_THWC: np.ndarray) -> torch.Tensor:
        latents_CTHW = super().encode(frames_THWC)
        if not is_blank(frames_THWC):
            return latents_CTHW
        mean = torch.tensor(self.latents_mean, dtype=torch.float32).view(-1, 1, 1, 1)
        return mean.to(latents_CTHW.dtype).expand_as(latents_CTHW).contiguous()


class TextEncoder:
    """Contexts for the base, and for the controlnet where its projection is another one."""

    def __init__(self, model: ModelConfig, config: EncodeConfig, device: torch.device) -> None:
        self._encoder = cosmos25.TextEncoder(model, config, device)
        if _has_two_projections(model, config):
            self._encoder.add_projection(component_folder(model, "controlnet"))

    def num_tokens(self, caption: str) -> int:
        """As `encode.cosmos25.TextEncoder` counts."""
        return self._encoder.num_tokens(caption)

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Encode captions to contexts [B, L, D] or [B, L, 2 D] in `encode.dtype`, on the CPU."""
        return self._encoder.encode(captions)

    def null(self) -> torch.Tensor:
        """The context of dropped text."""
        return self._encoder.null()
