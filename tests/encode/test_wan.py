"""The faster VAE encoder is diffusers' encoder, whatever the number of frames and the size of its chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from encode.wan import ChunkedEncoder, chunks

HEIGHT, WIDTH = 32, 48
FP32 = 1e-5


@pytest.fixture(scope="module")
def vae(tiny_checkpoint: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(tiny_checkpoint, subfolder="vae")


def frames(num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randint(0, 256, (num_frames, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator)


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())


def stock(vae: AutoencoderKLWan, frames_THWC: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(frames_THWC.permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).latent_dist.mean[0]


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17, 29, 33, 61, 93])
def test_latents_are_those_of_diffusers(vae: AutoencoderKLWan, num_frames: int) -> None:
    given = frames(num_frames)
    expected = stock(vae, given)
    for chunk_frames in (32, 12, 4):
        encoder = ChunkedEncoder(vae, chunk_pixels=chunk_frames * HEIGHT * WIDTH)
        assert distance(encoder.encode(given), expected) < FP32


def test_a_clip_leaves_nothing_behind_for_the_next(vae: AutoencoderKLWan) -> None:
    encoder = ChunkedEncoder(vae, chunk_pixels=4 * HEIGHT * WIDTH)
    encoder.encode(frames(9))
    assert distance(encoder.encode(frames(13)), stock(vae, frames(13))) < FP32


def test_chunks_cover_every_frame_once_in_two_lengths() -> None:
    for num_frames in range(1, 200, 4):
        for limit in (1, 4, 15, 16, 32):
            cuts = list(chunks(num_frames, limit))
            assert [frame for begin, end in cuts for frame in range(begin, end)] == list(range(num_frames))
            lengths = [end - begin for begin, end in cuts]
            assert lengths[0] % 4 == 1
            assert len(set(lengths[1:])) <= 1
            assert all(length % 4 == 0 and length <= max(4, limit) for length in lengths[1:])
    assert [end - begin for begin, end in chunks(93, 32)] == [29, 32, 32]


def test_another_kind_of_vae_is_refused(vae: AutoencoderKLWan) -> None:
    other = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True)
    with pytest.raises(ValueError, match=r"covers Wan 2\.1's VAE"):
        ChunkedEncoder(other)
