"""Cosmos-Predict2.5 when generating: which sizes, lengths and inputs a video may have, and what they become."""

from __future__ import annotations

from collections.abc import Iterable

from infer.request import Request
from manifests.errors import UsageError

SIZE_MULTIPLE = 16
"""VAE stride 8 times the DiT's patch 2."""

FRAME_STRIDE = 4
OVERLAPS = (1, 5)


def check_request(request: Request) -> None:
    """Raise UsageError unless the model can make this video."""
    where = request.name
    for side, size in (("height", request.height), ("width", request.width)):
        if size <= 0 or size % SIZE_MULTIPLE:
            near = _around(size, SIZE_MULTIPLE, 0)
            raise UsageError(f"{where}: {side} = {size} is not divisible by {SIZE_MULTIPLE}; near: {near}")
    key, frames = "num_frames", request.num_frames
    if request.chunk_frames is not None and request.num_frames > request.chunk_frames:
        key, frames = "chunk_frames", request.chunk_frames
    if frames <= 0 or frames % FRAME_STRIDE != 1:
        raise UsageError(f"{where}: {key} = {frames} is not 4k+1; near: {_around(frames, FRAME_STRIDE, 1)}")
    latent_frames = latent_frames_of(frames)
    if key == "chunk_frames" and (request.chunk_overlap not in OVERLAPS or request.chunk_overlap >= frames):
        raise UsageError(
            f"{where}: chunk_overlap = {request.chunk_overlap}; it is {_either(OVERLAPS)} (1 or 2 latent frames), "
            f"and less than chunk_frames = {frames}"
        )
    clean = request.num_latent_conditional_frames
    allowed = (1, 2) if request.video else (1,) if request.image else (0,)
    if clean not in allowed or (request.image and request.video):
        kind = "a video" if request.video else "an image" if request.image else "text alone"
        raise UsageError(f"{where}: {kind} gives {_either(allowed)} conditioning latent frames, not {clean}")
    if clean and clean >= latent_frames:
        raise UsageError(
            f"{where}: {key} = {frames} is {latent_frames} latent frames, all of them "
            f"conditioning; the least is {FRAME_STRIDE * clean + 1}"
        )


def latent_frames_of(num_frames: int) -> int:
    """Latent frames that `num_frames`, 4k+1, become."""
    return (num_frames - 1) // FRAME_STRIDE + 1


def num_tokens(request: Request) -> int:
    """Tokens of the transformer for one window of the request's video."""
    frames = min(request.num_frames, request.chunk_frames or request.num_frames)
    return latent_frames_of(frames) * (request.height // SIZE_MULTIPLE) * (request.width // SIZE_MULTIPLE)


def _around(size: int, stride: int, offset: int) -> str:
    """The nearest valid sizes below and above."""
    below = (size - offset) // stride * stride + offset
    least = offset or stride
    return _either(sorted({max(below, least), max(below + stride, least)}))


def _either(values: Iterable[int]) -> str:
    return " or ".join(str(value) for value in values)
