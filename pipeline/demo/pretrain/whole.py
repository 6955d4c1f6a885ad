"""Wan 2.1's VAE over a whole clip at once: the same function as diffusers' loop over chunks of 4 frames.

A causal convolution over a clip is the same as one over chunks that keeps the last frames of each; only where frames
are halved or doubled is the clip's first frame apart. Training takes a fifth of the kernels this way.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor


class _WholeResample(WanResample):
    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        if self.mode == "upsample3d" and x.shape[2] > 1:
            pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
            x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        if self.mode == "downsample3d" and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


class WholeClips:
    """A VAE's two halves for clips of 4k + 1 frames; while this is in use the VAE's own methods are not."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._resamples = [module for module in vae.modules() if type(module) is WanResample]

    def __enter__(self) -> WholeClips:
        for module in self._resamples:
            module.__class__ = _WholeResample
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._resamples:
            module.__class__ = WanResample

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, [B, C, T', H / 8, W / 8] each."""
        mean, logvar = self._vae.quant_conv(self._vae.encoder(video_BCTHW)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """The video [B, 3, T, H, W], not yet cut to [-1, 1]."""
        return self._vae.decoder(self._vae.post_quant_conv(latents_BCTHW))
