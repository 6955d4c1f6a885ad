"""The `infer` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from manifests.config import STRICT, Dtype, Place, Seed
from manifests.hints import HintKind


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterConfig:
    """path: a folder with `pytorch_lora_weights.safetensors`, or that file. weight: its scale.

    sigma_min, sigma_max: the adapter works in the denoising steps whose sigma, 1 for noise and 0 for the video, is
    sigma_min or more and less than sigma_max; null means no end.
    """

    path: Place
    weight: float = 1.0
    sigma_min: float = Field(default=0.0, ge=0, le=1)
    sigma_max: float | None = Field(default=None, gt=0, le=1)

    @property
    def has_range(self) -> bool:
        return self.sigma_min > 0 or self.sigma_max is not None

    def works_at(self, sigma: float) -> bool:
        return self.sigma_min <= sigma and (self.sigma_max is None or sigma < self.sigma_max)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ControlnetConfig:
    """A controlnet: a folder with `config.json` and weights, or a hub id; revision: of the hub id."""

    path: Place
    revision: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InferConfig:
    """How videos are generated.

    output: folder the videos go to. inputs: a prompt, a `.png/.txt` folder, or a `.json`, `.jsonl` or `.yaml` file.
    adapters: by name; empty means the base model. fuse: merge adapters into the weights before generating.
    height, width: pixels, divisible by 16. num_frames: 4k+1, or any number above chunk_frames. fps: of the written MP4;
    0.01 to 1000, since files hold it as a fraction.
    num_steps: denoising steps. guidance: g in v_c + g (v_c - v_u); 1 or less turns it off, as diffusers does.
    negative_prompt: null means the model's default. seed: of the initial noise, drawn on the CPU.
    conditioning_timestep: as in `train.objective`.
    chunk_frames: 4k+1; a longer video is made in pieces of that many frames, the window the released models were
    trained on; null makes any length at once. chunk_overlap: frames of a piece that the next begins with, 1 or 5
    (1 or 2 latent frames).
    parallel: what several ranks do. requests: each makes videos of its own. cfg: pairs make one, a rank for the prompt
    and one for the negative prompt. context: all share the tokens of one video. auto: requests while there are enough
    of them, else pairs, else shared tokens. Frames are the same within rounding, and exactly so with `requests`.
    controlnets: of a Transfer model: the controlnet of each kind of hint; kinds without use `model.controlnet`.
    side_by_side: of a Transfer model: also write each video beside its hints and its input, in `side_by_side/`.
    grid: also write `grid.mp4`, the videos side by side.
    base_linears: how the wide linear layers of the base compute. `dtype`: in `dtype`. `fp8`: in 8-bit floating point
    with a scale a row, adapters as they are; faster and less exact (benchmarks/results/inference_*.md), for
    `dtype = bfloat16` and GPUs from Ada and Hopper. The control branch of a Transfer model stays in `dtype`.
    ground_truth: folder with `<name>.mp4` for each request, to compare with by PSNR and SSIM.
    """

    output: Place = "videos"
    inputs: str | None = None
    adapters: dict[str, AdapterConfig] = Field(default_factory=dict)
    fuse: bool = False
    height: int = 704
    width: int = 1280
    num_frames: int = 93
    fps: float = Field(default=16.0, ge=0.01, le=1000)
    num_steps: int = Field(default=36, ge=1)
    guidance: float = Field(default=7.0, ge=0)
    negative_prompt: str | None = None
    seed: Seed = 0
    conditioning_timestep: float = 0.0001
    chunk_frames: int | None = 93
    chunk_overlap: int = 1
    parallel: Literal["auto", "requests", "cfg", "context"] = "auto"
    controlnets: dict[HintKind, ControlnetConfig] = Field(default_factory=dict)
    side_by_side: bool = False
    grid: bool = False
    ground_truth: str | None = None
    dtype: Dtype = "bfloat16"
    base_linears: Literal["dtype", "fp8"] = "dtype"
