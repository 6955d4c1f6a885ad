"""The `data` and `encode` sections of a recipe."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from manifests.config import STRICT, Dtype, Place, Seed
from manifests.errors import UsageError
from manifests.hints import HintKind, Preset
from manifests.mixture import Mixture

Layout = Literal["folder", "pairs", "gr1", "videoufo", "webdataset", "huggingface", "table"]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FiltersConfig:
    """Which videos of a dataset are left out, before anything is encoded; counted, unlike those that are broken.

    min_frames: frames of the source, or of the part of it that is used; an image has one.
    min_seconds, max_seconds: duration of the same. min_height, min_width: pixels of the source, after rotation.
    min_fps: mean frames a second of the source.
    first: at most so many, the first in the dataset's order that no other filter leaves out; the rest are not read.
    where: a condition on the values that come with a video: the columns of its table, or the fields of its JSON file
        (`manifests/filters.py` has the grammar): `"aesthetic >= 5 and not source = 'web'"`.
    """

    min_frames: int | None = Field(default=None, ge=1)
    min_seconds: _Positive | None = None
    max_seconds: _Positive | None = None
    min_height: int | None = Field(default=None, ge=1)
    min_width: int | None = Field(default=None, ge=1)
    min_fps: _Positive | None = None
    first: int | None = Field(default=None, ge=1)
    where: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DatasetConfig:
    """One place videos and captions come from.

    layout: name of the file in `encode/sources/` that reads it, and says what it looks like.
    path: the folder, or the table or tar file; relative to the working directory.
    media: `images` reads pictures as videos of one frame, for `encode.num_frames = 1`.
    weight: the share of the training samples that come from this dataset, relative to the others'; null in every
        dataset draws all samples equally often. Not part of the cache.
    prompt: one caption for every video, instead of those of the dataset.
    prompt_prefix: text put before every caption, verbatim.
    captions: names of the captions to use where a video has several (`long`, `medium`, `short`; the columns of a
        table), with how often each is drawn relative to the others; null uses all there are, equally often. The
        weights are not part of the cache, the names are.
    caption_model: whose captions to use where a JSON file has those of several models.
    video_column, caption_column, weight_column: column names, for tables; null means the layout's own. A weight
        draws its row that much more or less often than others of the dataset, whose weight is 1 unless stated.
    start_column, end_column: optional columns of a table, seconds from the video's first frame; a row without
        them is the whole video.
    hints_path: the folder with `depth/<name>.mp4`, `seg/<name>.mp4` and `image_context/<name>.npy` of each video, where
        `encode.hints` asks for them; null means the dataset's own folder.
    allow_missing_videos: leave out captions whose video is not there, for parts of a large dataset, and count them.
    """

    layout: Layout
    path: Place
    media: Literal["videos", "images"] = "videos"
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    prompt: str | None = None
    prompt_prefix: str = ""
    captions: dict[str, _Positive] | None = Field(default=None, min_length=1)
    caption_model: str | None = None
    video_column: str | None = None
    caption_column: str | None = None
    weight_column: str = "weight"
    start_column: str = "start"
    end_column: str = "end"
    hints_path: str | None = None
    allow_missing_videos: bool = False
    filters: FiltersConfig = Field(default_factory=FiltersConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """datasets: the places to read, by name; the name is recorded with every sample."""

    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)

    @property
    def mixture(self) -> Mixture:
        """How often training draws from each dataset and caption. Raises `UsageError` for weights that say nothing."""
        weights = {name: dataset.weight for name, dataset in self.datasets.items()}
        known = {name: weight for name, weight in weights.items() if weight is not None}
        without = sorted(weights.keys() - known.keys())
        if known and without:
            raise UsageError(
                f"data.datasets: {', '.join(sorted(known))} have a weight, {', '.join(without)} have none; "
                "give one to every dataset, or to none"
            )
        if known and not sum(known.values()):
            raise UsageError(f"data.datasets: the weights of {', '.join(known)} sum to 0; give one at least a share")
        captions = {name: dict(dataset.captions) for name, dataset in self.datasets.items() if dataset.captions}
        return Mixture(datasets=known or None, captions=captions)


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
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HintsConfig:
    """Control videos kept beside the latents, for models that take them (`manifests.hints` says what they are).

    kinds: `edge` and `vis` are computed from each window, `depth` and `seg` are videos the dataset has.
    variants: of each computed hint a window, each with parameters of its own; training draws one a visit.
    seed: of the parameters, which are drawn from the video's hash, the window and the variant.
    edge_preset, vis_preset: fixed parameters, those of inference, instead of drawn ones; one variant then.
    image_context: `given`: each video has the embedding of a reference image, which training then shows the model
        (`manifests.image_context` says what files); `zero`: none, as in diffusers' pipeline.
    """

    kinds: tuple[HintKind, ...] = ()
    variants: int = Field(default=4, ge=1, le=64)
    seed: Seed = 0
    edge_preset: Preset | None = None
    vis_preset: Preset | None = None
    image_context: Literal["zero", "given"] = "zero"

    @field_validator("kinds")
    @classmethod
    def _are_different(cls, value: tuple[HintKind, ...]) -> tuple[HintKind, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name each kind once")
        return tuple(sorted(value))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExtractConfig:
    """Models that `latentline encode --make` makes control videos with: folders or hub ids, in transformers' format.

    seg_points: a side of the grid of points in the first frame, at each of which an object is looked for.
    """

    depth: str = "depth-anything/Depth-Anything-V2-Small-hf"
    seg: str = "facebook/sam2.1-hiera-small"
    seg_points: int = Field(default=6, ge=1, le=32)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncodeConfig:
    """What is written to the cache, and how the work is spread.

    cache: local folder or object-store URL (s3://, gs://, az://).
    snapshot: name that points at the snapshot `encode` writes.
    height, width: pixels, divisible by 16. num_frames: 4k+1 frames at `fps` (`source`: the source's own rate).
    resize: `stretch` videos to height x width, or fit them and `pad` with their reflection, which training then masks.
    hints: control videos to keep besides. extract: models that make depth and seg videos on request.
    dtype: compute and storage dtype of latents and contexts.
    text: `projected` stores the DiT's 1,024-wide projection of the text, `raw` the full 100,352-wide one.
    text_length: tokens a caption is padded or truncated to.
    negative_prompts: further captions to keep contexts of; the model's default one is always kept.
    shard_mb: size a shard aims at, in MiB of entries.
    text_batch: captions a text-encoder call. decode_workers: decoding processes an encoder; null means
    one a core this process may use, from 2 to 8.
    decode_timeout: seconds one window may take to decode before its video is quarantined; 8 times that to blur it.
    encoders: encoder actors; null means one a GPU, or one on a CPU.
    max_failed: fraction of the videos that may be quarantined before the job stops.
    """

    cache: Place
    snapshot: str = "train"
    height: int = 704
    width: int = 1280
    num_frames: int = 93
    fps: Annotated[float, Field(gt=0)] | Literal["source"] = 16.0
    windows: WindowsConfig = Field(default_factory=WindowsConfig)
    resize: Literal["stretch", "pad"] = "stretch"
    hints: HintsConfig = Field(default_factory=HintsConfig)
    extract: ExtractConfig = Field(default_factory=ExtractConfig)
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
