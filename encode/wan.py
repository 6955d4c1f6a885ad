"""The Wan 2.1 VAE's encoder, faster: diffusers' weights and results, in few kernels and large causal chunks.

What differs from `AutoencoderKLWan.encode`:
- Chunks of up to 32 frames, not 4; the first holds the clip's first frame too. Each convolution keeps the last two
  frames of its input for the next chunk, as diffusers' feature cache does.
- Convolutions run as shifted matrix products over one flat layout (`encode.grid`), with bias, residual and padding
  in the same kernel; RMS norm and SiLU are one kernel. Sums are float32 and rounded once.
- Only the posterior mean is computed: no log-variance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import Tensor

from encode.grid import CausalConv, Grid, flatten, norm_silu

STRIDE = 4
CHUNK_PIXELS = 32 * 432 * 768
"""Pixels of a chunk: memory peaks at about 900 bytes a pixel, 9 GiB."""


class ChunkedEncoder:
    """The encoder of a VAE, on its device and in its dtype.

    Raises `ValueError` for configurations other than Wan 2.1's: residual down blocks, patches, attention between
    the down blocks.
    """

    def __init__(self, vae: AutoencoderKLWan, *, chunk_pixels: int = CHUNK_PIXELS) -> None:
        config = vae.config
        if config.is_residual or config.patch_size is not None or config.attn_scales:
            raise ValueError("the faster encoder covers Wan 2.1's VAE: no residual down blocks, patches or attn_scales")
        encoder = vae.encoder
        middle = encoder.mid_block
        self._vae = vae
        self._chunk_pixels = chunk_pixels
        self._first = CausalConv(encoder.conv_in)
        layers = [*encoder.down_blocks, middle.resnets[0], middle.attentions[0], middle.resnets[1]]
        self._layers = [_layer(layer) for layer in layers]
        self._norm_out = encoder.norm_out.gamma.flatten()
        self._last = CausalConv(encoder.conv_out)

    @torch.no_grad()
    def encode(self, frames_THWC: Tensor) -> Tensor:
        """Encode uint8 RGB [T, H, W, 3], T = 4k + 1, on any device, to the posterior mean [C, T', H/8, W/8]."""
        past: dict[Any, Tensor] = {}
        codes = [
            self._encode_chunk(frames_THWC[begin:end], past)
            for begin, end in chunks(frames_THWC.shape[0], self._chunk_pixels // frames_THWC[0, ..., 0].numel())
        ]
        codes_THWC = torch.cat(codes)
        num_latents = self._vae.config.z_dim
        weight = self._vae.quant_conv.weight[:num_latents].flatten(1)
        return F.linear(codes_THWC, weight, self._vae.quant_conv.bias[:num_latents]).permute(3, 0, 1, 2)

    def _encode_chunk(self, frames_THWC: Tensor, past: dict[Any, Tensor]) -> Tensor:
        device, dtype = self._first.bias_N.device, self._first.bias_N.dtype
        frames = frames_THWC.pin_memory() if device.type == "cuda" and not frames_THWC.is_cuda else frames_THWC
        pixels = frames.to(device, non_blocking=True)
        grid = Grid(*pixels.shape[:3])
        x_RC = grid.input(self._first.in_channels, self._first.bias_N, past.get(self._first))
        present = grid.present(x_RC).zero_()
        grid.clip(present)[..., :3] = (pixels.float() / 127.5 - 1.0).to(dtype)
        y_RC = convolve(self._first, grid, x_RC, past)
        for layer in self._layers:
            grid, y_RC = layer(grid, y_RC, past)
        y_RC = norm_convolve(self._norm_out, self._last, grid, y_RC, past)
        return grid.clip(y_RC)


def chunks(num_frames: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut 4k + 1 frames into (begin, end) of 4j frames each, j as large as `limit` allows; the first has one more.

    All but the first are of one length, so few shapes occur.
    """
    length = max(STRIDE, limit // STRIDE * STRIDE)
    begin, end = 0, 1 + ((num_frames - 1) % length or min(length, num_frames - 1))
    while begin < num_frames:
        yield begin, end
        begin, end = end, end + length


def convolve(conv: CausalConv, grid: Grid, x_RC: Tensor, past: dict[Any, Tensor], *extra: Tensor) -> Tensor:
    past[conv] = grid.kept(x_RC)
    return conv(grid, x_RC, *extra)


def norm_convolve(
    gamma_C: Tensor, conv: CausalConv, grid: Grid, y_RC: Tensor, past: dict[Any, Tensor], *extra: Tensor
) -> Tensor:
    x_RC = grid.input(conv.in_channels, y_RC, past.get(conv))
    norm_silu(y_RC, gamma_C, grid.present(x_RC))
    return convolve(conv, grid, x_RC, past, *extra)


def _layer(module: torch.nn.Module) -> Any:
    if isinstance(module, WanResidualBlock):
        return Residual(module)
    return Downsample(module) if isinstance(module, WanResample) else Attention(module)


class Residual:
    def __init__(self, block: WanResidualBlock) -> None:
        self._gammas = block.norm1.gamma.flatten(), block.norm2.gamma.flatten()
        self._convs = CausalConv(block.conv1), CausalConv(block.conv2)
        self._shortcut = block.conv_shortcut if isinstance(block.conv_shortcut, torch.nn.Conv3d) else None

    def __call__(self, grid: Grid, y_RC: Tensor, past: dict[Any, Tensor]) -> tuple[Grid, Tensor]:
        residual_RN = y_RC
        if self._shortcut is not None:
            residual_RN = F.linear(y_RC, self._shortcut.weight.flatten(1), self._shortcut.bias)
        y_RC = norm_convolve(self._gammas[0], self._convs[0], grid, y_RC, past)
        return grid, norm_convolve(self._gammas[1], self._convs[1], grid, y_RC, past, residual_RN)


class Downsample:
    """Halve height and width, and for `downsample3d` the frames after the clip's first."""

    def __init__(self, resample: WanResample) -> None:
        _, conv = resample.resample
        self._weight = conv.weight.contiguous(memory_format=torch.channels_last)
        self._bias = conv.bias
        self._over_time = resample.time_conv if resample.mode == "downsample3d" else None

    def __call__(self, grid: Grid, y_RC: Tensor, past: dict[Any, Tensor]) -> tuple[Grid, Tensor]:
        # The layout's zeros are the padding that this convolution wants: one line below, one pixel to the right.
        y_TCHW = grid.padded(y_RC).permute(0, 3, 1, 2)
        clip_THWC = F.conv2d(y_TCHW, self._weight, self._bias, stride=2).permute(0, 2, 3, 1)
        if self._over_time is not None:
            clip_THWC = self._halve_time(clip_THWC, past)
        return flatten(clip_THWC)

    def _halve_time(self, clip_THWC: Tensor, past: dict[Any, Tensor]) -> Tensor:
        assert self._over_time is not None
        before, past[self] = past.get(self), clip_THWC[-1:].clone()
        frames = clip_THWC if before is None else torch.cat([before, clip_THWC])
        weight = self._over_time.weight[..., 0, 0].permute(0, 2, 1).flatten(1)
        triples = torch.cat([frames[:-2:2], frames[1:-1:2], frames[2::2]], -1)
        halved = F.linear(triples, weight, self._over_time.bias)
        return halved if before is not None else torch.cat([clip_THWC[:1], halved])


class Attention:
    """Self-attention within each frame, one head."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __call__(self, grid: Grid, y_RC: Tensor, past: dict[Any, Tensor]) -> tuple[Grid, Tensor]:
        block = self._block
        clip_THWC = grid.clip(y_RC)
        pixels_TPC = clip_THWC.flatten(1, 2)
        gamma = block.norm.gamma.flatten()
        normed = F.normalize(pixels_TPC.float(), dim=-1) * pixels_TPC.shape[-1] ** 0.5 * gamma.float()
        qkv = F.linear(normed.to(y_RC.dtype), block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        attended = F.scaled_dot_product_attention(*(part.unsqueeze(1) for part in qkv.chunk(3, -1))).squeeze(1)
        out = F.linear(attended, block.proj.weight.flatten(1), block.proj.bias) + pixels_TPC
        return flatten(out.view(clip_THWC.shape))
