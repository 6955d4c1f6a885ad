"""The `data` and `encode` sections of a recipe."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from manifests.config import STRICT, Dtype


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DatasetConfig:
    """One place videos and captions come from.

    layout: name of the file in `encode/sources/` that reads it.
    path: the folder, or the table file; relative to the working directory.
    prompt: one caption for every video, instead of caption files.
    prompt_prefix: text put before every caption, verbatim.
    video_column, caption_column: column names, for `layout = "table"`.
    start_column, end_column: optional columns of a table, seconds from the video's first frame; a row without
        them is the whole video.
    """

    layout: Literal["folder", "table"]
    path: str
    prompt: str | None = None
    prompt_prefix: str = ""
    video_column: str = "video"
    caption_column: str = "caption"
    start_column: str = "start"
    end_column: str = "end"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """datasets: the places to read, by name; the name is recorded with every sample."""

    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WindowsConfig:
    """Which frame ranges of a video become samples.

    mode: `head` (the first window), `uniform` (`count` windows evenly spread), `random` (`count` windows
        drawn from the source hash and `seed`), `slide` (every `stride` target frames).
    count: windows a video, for `uniform` and `random`.
    stride: target frames between window starts, for `slide`; default `num_frames`.
    """

    mode: Literal["head", "uniform", "random", "slide"] = "head"
    count: int = Field(default=1, ge=1)
    stride: int | None = Field(default=None, ge=1)
    seed: int = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncodeConfig:
    """What is written to the cache, and how the work is spread.

    cache: local folder or object-store URL (s3://, gs://, az://).
    snapshot: name that points at the snapshot `encode` writes.
    height, width: pixels, divisible by 16. num_frames: 4k+1 frames at `fps` (`source`: the source's own rate).
    dtype: compute and storage dtype of latents and contexts.
    text: `projected` stores the DiT's 1,024-wide projection of the text, `raw` the full 100,352-wide one.
    text_length: tokens a caption is padded or truncated to.
    negative_prompts: further captions to keep contexts of; the model's default one is always kept.
    shard_mb: size a shard aims at, in MiB of entries.
    text_batch: captions a text-encoder call. decode_workers: decoding processes an encoder; null means
    one a core this process may use, from 2 to 8.
    decode_timeout: seconds one window may take to decode before its video is quarantined.
    encoders: encoder actors; null means one a GPU, or one on a CPU.
    max_failed: fraction of the videos that may be quarantined before the job stops.
    """

    cache: str
    snapshot: str = "train"
    height: int = 704
    width: int = 1280
    num_frames: int = 93
    fps: Annotated[float, Field(gt=0)] | Literal["source"] = 16.0
    windows: WindowsConfig = Field(default_factory=WindowsConfig)
    dtype: Dtype = "bfloat16"
    text: Literal["projected", "raw"] = "projected"
    text_length: int = Field(default=512, ge=1)
    negative_prompts: tuple[str, ...] = ()
    shard_mb: float = Field(default=256.0, gt=0)
    text_batch: int = Field(default=8, ge=1)
    decode_workers: int | None = Field(default=None, ge=1)
    decode_timeout: float = Field(default=300.0, gt=0)
    encoders: int | None = Field(default=None, ge=1)
    executor: Literal["ray", "local"] = "ray"
    max_failed: float = Field(default=0.1, ge=0, le=1)

    @property
    def target_fps(self) -> float | None:
        """Target frames a second; None for the source's own rate."""
        return None if self.fps == "source" else self.fps

    @property
    def num_decoders(self) -> int:
        """Decoding processes of one encoder."""
        return self.decode_workers or max(2, min(8, len(os.sched_getaffinity(0))))
