"""The Wan 2.1 VAE's decoder, faster: diffusers' weights and results, by the encoder's kernels and layout.

What differs from `AutoencoderKLWan.decode`:
- Chunks of up to 32 frames, not 4. Each causal convolution keeps the last two frames of its input for the next chunk.
- Convolutions, norms and attention are those of `encode.wan`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from encode.grid import HISTORY, CausalConv, Grid, flatten
from encode.wan import CHUNK_PIXELS, STRIDE, Attention, Residual, chunks, convolve, norm_convolve

PATCH = 8
"""Pixels a latent is high and wide."""


def accelerate_decode(vae: AutoencoderKLWan) -> None:
    """Give a VAE, on the device and in the dtype where it stays, the faster `decode`; it stays an `AutoencoderKLWan`.

    Raises `ValueError` where `ChunkedDecoder` does.
    """
    vae.fast_decoder = ChunkedDecoder(vae)
    vae.__class__ = FastDecodingVae


class FastDecodingVae(AutoencoderKLWan):
    """The VAE with the faster decode; made by `accelerate_decode`, never built."""

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, C, T', H / 8, W / 8] to frames [B, 3, T, H, W] in [-1, 1]."""
        frames = torch.stack([self.fast_decoder.decode(latents).permute(3, 0, 1, 2) for latents in z])
        return DecoderOutput(sample=frames) if return_dict else (frames,)


class ChunkedDecoder:
    """The decoder of a VAE, on its device and in its dtype.

    Raises `ValueError` for configurations other than Wan 2.1's: residual up blocks or patches.
    """

    def __init__(self, vae: AutoencoderKLWan, *, chunk_pixels: int = CHUNK_PIXELS) -> None:
        if vae.config.is_residual or vae.config.patch_size is not None:
            raise ValueError("the faster decoder covers Wan 2.1's VAE: no residual up blocks or patches")
        decoder = vae.decoder
        middle = decoder.mid_block
        self._chunk_pixels = chunk_pixels
        self._post_quant = vae.post_quant_conv
        self._first = CausalConv(decoder.conv_in)
        self._layers: list[Any] = [Residual(middle.resnets[0]), Attention(middle.attentions[0])]
        self._layers.append(Residual(middle.resnets[1]))
        for block in decoder.up_blocks:
            self._layers += [Residual(resnet) for resnet in block.resnets]
            self._layers += [Upsample(resample) for resample in block.upsamplers or ()]
        self._norm_out = decoder.norm_out.gamma.flatten()
        self._last = CausalConv(decoder.conv_out)

    @torch.no_grad()
    def decode(self, latents_CTHW: Tensor) -> Tensor:
        """Decode latents [C, T', H / 8, W / 8], as the VAE gave them, to frames [4 T' - 3, H, W, 3] in [-1, 1]."""
        z_THWC = latents_CTHW.permute(1, 2, 3, 0).to(self._post_quant.weight.dtype)
        z_THWC = F.linear(z_THWC, self._post_quant.weight.flatten(1), self._post_quant.bias)
        past: dict[Any, Tensor] = {}
        num_frames = STRIDE * (z_THWC.shape[0] - 1) + 1
        limit = self._chunk_pixels // (z_THWC.shape[1] * z_THWC.shape[2] * PATCH**2)
        return torch.cat(
            [
                self._decode_chunk(z_THWC[_latents_before(begin) : _latents_before(end)], past)
                for begin, end in chunks(num_frames, limit)
            ]
        )

    def _decode_chunk(self, z_THWC: Tensor, past: dict[Any, Tensor]) -> Tensor:
        grid = Grid(*z_THWC.shape[:3])
        x_RC = grid.input(self._first.in_channels, z_THWC, past.get(self._first))
        present = grid.present(x_RC).zero_()
        grid.clip(present)[..., : z_THWC.shape[3]] = z_THWC
        y_RC = convolve(self._first, grid, x_RC, past)
        for layer in self._layers:
            grid, y_RC = layer(grid, y_RC, past)
        return grid.clip(norm_convolve(self._norm_out, self._last, grid, y_RC, past)).clamp(-1.0, 1.0)


def _latents_before(frame: int) -> int:
    """Latent frames that hold the first `frame` frames; the first latent holds one, the others four."""
    return -(-(frame - 1) // STRIDE) + 1 if frame else 0


class Upsample:
    """Double height and width, and for `upsample3d` the frames after the clip's first."""

    def __init__(self, resample: WanResample) -> None:
        _, conv = resample.resample
        self._weight = conv.weight.contiguous(memory_format=torch.channels_last)
        self._bias = conv.bias
        self._over_time = resample.time_conv if resample.mode == "upsample3d" else None

    def __call__(self, grid: Grid, y_RC: Tensor, past: dict[Any, Tensor]) -> tuple[Grid, Tensor]:
        clip_THWC = grid.clip(y_RC)
        if self._over_time is not None:
            clip_THWC = self._double_time(clip_THWC, past)
        wide_TCHW = F.interpolate(
            clip_THWC.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), scale_factor=2.0
        )
        return flatten(F.conv2d(wide_TCHW, self._weight, self._bias, padding=1).permute(0, 2, 3, 1))

    def _double_time(self, clip_THWC: Tensor, past: dict[Any, Tensor]) -> Tensor:
        """Each frame but the clip's first becomes two; the causal convolution that makes them never sees the first."""
        assert self._over_time is not None
        begins = self not in past
        frames = clip_THWC[1:] if begins else clip_THWC
        before = frames.new_zeros(HISTORY, *frames.shape[1:]) if begins else past[self]
        frames = torch.cat([before, frames])
        past[self] = frames[-HISTORY:].clone()
        weight = self._over_time.weight[..., 0, 0].permute(0, 2, 1).flatten(1)
        pairs = F.linear(torch.cat([frames[:-2], frames[1:-1], frames[2:]], -1), weight, self._over_time.bias)
        doubled = pairs.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        return torch.cat([clip_THWC[:1], doubled]) if begins else doubled
