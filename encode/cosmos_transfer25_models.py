"""Cosmos-Transfer2.5's encoders: Predict's, one for hints, and contexts for both projections.

Mirrors diffusers' `Cosmos2_5_TransferPipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from encode import cosmos25_models
from encode.config import EncodeConfig
from encode.cosmos25_models import VideoDecoder, VideoEncoder, accelerate_vae
from encode.cosmos_transfer25 import has_two_projections
from manifests.config import ModelConfig
from manifests.fingerprint import component_folder
from manifests.hints import is_blank

__all__ = ["HintEncoder", "TextEncoder", "VideoDecoder", "VideoEncoder", "accelerate_vae"]


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
        self._encoder = cosmos25_models.TextEncoder(model, config, device)
        if has_two_projections(model, config):
            self._encoder.add_projection(component_folder(model, "controlnet"))

    def num_tokens(self, caption: str) -> int:
        """As `encode.cosmos25_models.TextEncoder` counts."""
        return self._encoder.num_tokens(caption)

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Encode captions to contexts [B, L, D] or [B, L, 2 D] in `encode.dtype`, on the CPU."""
        return self._encoder.encode(captions)

    def null(self) -> torch.Tensor:
        """The context of dropped text."""
        return self._encoder.null()
