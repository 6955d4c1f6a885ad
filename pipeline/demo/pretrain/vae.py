"""The VAE: Wan 2.1's architecture, an eighth as wide and half as deep, trained to reconstruct the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from pipeline.demo.pretrain.data import base_scenes, drawn
from pipeline.demo.pretrain.loop import Loop
from pipeline.demo.pretrain.whole import WholeClips

KL_WEIGHT = 6e-3
FLOOR = 1e-4
"""Squared error below which a clip, 46 dB, is good enough."""


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=12, decoder_base_dim=12, z_dim=16, num_res_blocks=1)


@dataclass(frozen=True)
class Phase:
    """Steps over batches from the first `share` of the clips, of which the first `frames` frames are used.

    Half of all clips have random colours and forms; they come last.
    """

    steps: int
    batch_size: int
    frames: int
    share: float = 1.0


def train_vae(
    phases: Sequence[Phase], *, clips: int, device: torch.device, lr: float = 2e-3, seed: int = 0
) -> AutoencoderKLWan:
    """Train from scratch and set the latents' mean and deviation, as measured on the base domain.

    clips: drawn once and visited in random order.
    """
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    found = base_scenes(1000 + seed, clips)
    pool_NTHWC = torch.cat([drawn(found[: clips // 2], device), drawn(found[clips // 2 :], device, wild=seed)])
    for phase in phases:
        _run(vae, phase, pool_NTHWC, lr)
    vae.eval()
    measured = latents_of(vae, drawn(base_scenes(2000 + seed, min(clips, 2000)), device))
    mean, std = measured.mean((0, 2, 3, 4)), measured.std((0, 2, 3, 4))
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in mean.tolist()],
        latents_std=[round(value, 4) for value in std.tolist()],
    )
    return vae


def _run(vae: AutoencoderKLWan, phase: Phase, pool_NTHWC: Tensor, lr: float) -> None:
    device = pool_NTHWC.device
    loop = Loop("vae", vae.parameters(), steps=phase.steps, lr=lr, device=device)

    def loss(index: Tensor) -> dict[str, Tensor]:
        video_BCTHW = to_video(pool_NTHWC[index, : phase.frames])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, logvar = (part.float() for part in whole.encode(video_BCTHW))
            made_BCTHW = whole.decode(mean + torch.exp(logvar / 2) * torch.randn_like(mean)).float()
        square_B = (made_BCTHW - video_BCTHW).square().flatten(1).mean(1)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        # The mean of each clip's PSNR, so that the clips with the wildest colours do not take all of the capacity.
        return {
            "loss": torch.log(square_B + FLOOR).mean() + KL_WEIGHT * kl,
            "psnr": 10 * torch.log10(4 / square_B.detach()).mean(),
            "kl": kl.detach(),
        }

    index = torch.empty(phase.batch_size, dtype=torch.long, device=device)
    with WholeClips(vae, compiled=device.type == "cuda") as whole:
        for record in loop.run(loss, index, round(phase.share * len(pool_NTHWC)), every=500):
            loop.say(record)


def to_video(frames_NTHWC: Tensor) -> Tensor:
    """uint8 frames to [-1, 1], [N, 3, T, H, W]."""
    return frames_NTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def latents_of(vae: AutoencoderKLWan, frames_NTHWC: Tensor, batch_size: int = 256) -> Tensor:
    """Posterior means, unnormalised, float32 [N, 16, T', H / 8, W / 8]."""
    return torch.cat([vae.encode(to_video(part)).latent_dist.mode() for part in frames_NTHWC.split(batch_size)])


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, frames_NTHWC: Tensor, batch_size: int = 100) -> float:
    """Mean over clips, in dB over 8-bit values, of a trip through the VAE."""
    values = []
    for part in frames_NTHWC.split(batch_size):
        made = vae.decode(vae.encode(to_video(part)).latent_dist.mode()).sample
        bytes_BCTHW = ((made + 1) * 127.5).round().clamp(0, 255)
        error = (bytes_BCTHW - part.permute(0, 4, 1, 2, 3).float()).square().flatten(1).mean(1)
        values += (10 * torch.log10(255**2 / error)).tolist()
    return sum(values) / len(values)
