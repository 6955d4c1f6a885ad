"""Wan 2.1's VAE over a whole clip at once: the same function as diffusers' loop over chunks of 4 frames.

A causal convolution over a clip is the same as one over chunks that keeps the last frames of each; only where frames
are halved or doubled is the clip's first frame apart. Training takes a fifth of the kernels this way, and norm and
SiLU, which take more of its time than the convolutions, are one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import Tensor


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of diffusers' WanRMS_norm, in float32 inside."""
    wide = x.float()
    normed = wide * (x.shape[1] ** 0.5 / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12))
    return F.silu(normed * gamma).to(x.dtype)


class _WholeResidualBlock(WanResidualBlock):
    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        shortcut = self.conv_shortcut(x)
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            x = conv(self.norm_silu(x, norm.gamma))
        return x + shortcut


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

    def __init__(self, vae: AutoencoderKLWan, *, compiled: bool) -> None:
        self._vae = vae
        self._norm_silu = torch.compile(_norm_silu, dynamic=True) if compiled else _norm_silu
        self._whole = {WanResample: _WholeResample, WanResidualBlock: _WholeResidualBlock}

    def __enter__(self) -> WholeClips:
        for module in self._vae.modules():
            if type(module) is WanResidualBlock:
                module.norm_silu = self._norm_silu
            module.__class__ = self._whole.get(type(module), type(module))
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._vae.modules():
            if type(module) is _WholeResidualBlock:
                del module.norm_silu
            module.__class__ = {whole: own for own, whole in self._whole.items()}.get(type(module), type(module))

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, [B, C, T', H / 8, W / 8] each."""
        mean, logvar = self._vae.quant_conv(self._vae.encoder(video_BCTHW)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """The video [B, 3, T, H, W], not yet cut to [-1, 1]."""
        return self._vae.decoder(self._vae.post_quant_conv(latents_BCTHW))
