"""The faster VAE decoder is diffusers' decoder, whatever the number of frames and the size of its chunks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from encode.wan_decoder import ChunkedDecoder, accelerate_decode

HEIGHT, WIDTH = 32, 48
FP32 = 1e-5


@pytest.fixture(scope="module")
def vae(tiny_checkpoint: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(tiny_checkpoint, subfolder="vae")


def latents(vae: AutoencoderKLWan, num_latents: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_latents)
    return torch.randn(vae.config.z_dim, num_latents, HEIGHT // 8, WIDTH // 8, generator=generator)


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())


def stock(vae: AutoencoderKLWan, latents_CTHW: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(latents_CTHW[None], return_dict=False)[0][0].permute(1, 2, 3, 0)


@pytest.mark.parametrize("num_latents", [1, 2, 3, 6, 9])
def test_frames_are_those_of_diffusers(vae: AutoencoderKLWan, num_latents: int) -> None:
    given = latents(vae, num_latents)
    expected = stock(vae, given)
    assert expected.shape == (4 * num_latents - 3, HEIGHT, WIDTH, 3)
    for chunk_frames in (32, 12, 4):
        decoder = ChunkedDecoder(vae, chunk_pixels=chunk_frames * HEIGHT * WIDTH)
        assert distance(decoder.decode(given), expected) < FP32


def test_a_clip_leaves_nothing_behind_for_the_next(vae: AutoencoderKLWan) -> None:
    decoder = ChunkedDecoder(vae, chunk_pixels=4 * HEIGHT * WIDTH)
    decoder.decode(latents(vae, 3))
    assert distance(decoder.decode(latents(vae, 4)), stock(vae, latents(vae, 4))) < FP32


def test_a_vae_that_decodes_faster_stays_diffusers_vae(vae: AutoencoderKLWan) -> None:
    given = torch.stack([latents(vae, 2), latents(vae, 2) + 0.5])
    with torch.no_grad():
        expected = vae.decode(given).sample
    fast = copy.deepcopy(vae)
    accelerate_decode(fast)
    assert isinstance(fast, AutoencoderKLWan)
    assert fast.state_dict().keys() == vae.state_dict().keys()
    assert distance(fast.decode(given).sample, expected) < FP32
    assert distance(fast.decode(given, return_dict=False)[0], expected) < FP32


def test_another_kind_of_vae_is_refused() -> None:
    other = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True)
    with pytest.raises(ValueError, match=r"covers Wan 2\.1's VAE"):
        ChunkedDecoder(other)
