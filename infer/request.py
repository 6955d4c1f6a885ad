"""One video to make, as every form of input says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infer.config import InferConfig
from manifests.hints import HintKind, Preset


@dataclass(frozen=True, kw_only=True)
class Control:
    """One hint that steers a video.

    path: the control video; None computes it from the request's source, by `preset`. weight: 0 or more; weights are
    scaled down where they sum to more than 1. mask: a video, white where the hint counts.
    """

    kind: HintKind
    path: Path | None = None
    weight: float = 1.0
    mask: Path | None = None
    preset: Preset = "medium"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to make.

    name: file name of the video, without suffix. negative_prompt: null means the model's default.
    image, video: what to condition on, at most one; neither is text2world.
    num_latent_conditional_frames: clean latent frames at the start: 0 for text, 1 for an image, 1 or 2 for a
    video (its last 1 or 5 frames). chunk_frames: a longer video is made in pieces of that many frames; null makes
    any length at once. ground_truth: the video to compare with. controls: of a Transfer model. source: the video they
    are computed from. image_context: of a Transfer model: the embedding of a reference image. first_frame: of a piece,
    in the whole video. The rest as in InferConfig.
    """

    name: str
    prompt: str
    negative_prompt: str | None = None
    image: Path | None = None
    video: Path | None = None
    num_latent_conditional_frames: int = 0
    seed: int
    guidance: float
    num_steps: int
    num_frames: int
    height: int
    width: int
    chunk_frames: int | None = None
    chunk_overlap: int = 1
    ground_truth: Path | None = None
    controls: tuple[Control, ...] = ()
    source: Path | None = None
    image_context: Path | None = None
    first_frame: int = 0


def default_request(config: InferConfig) -> Request:
    """What `config` says of every request; name and prompt are still to come."""
    return Request(
        name="video",
        prompt="",
        negative_prompt=config.negative_prompt,
        seed=config.seed,
        guidance=config.guidance,
        num_steps=config.num_steps,
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        chunk_frames=config.chunk_frames,
        chunk_overlap=config.chunk_overlap,
    )
