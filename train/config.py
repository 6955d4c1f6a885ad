"""The `train` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from manifests.config import STRICT, Dtype, Place, Seed
from manifests.hints import HintKind

_Beta = Annotated[float, Field(ge=0, lt=1)]
Method = Literal["lora", "dora", "adapters", "full", "control"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """The adapter, for `method = lora | dora`.

    rank, alpha: as in LoRA (arXiv:2106.09685); the update is scaled by alpha / rank.
    targets: linear layers by the end of their name, in diffusers' naming (`to_q`, `attn2.to_q`) or NVIDIA's (`q_proj`,
    `cross_attn.q_proj`, `mlp.layer1`); empty means the family's default. Each must match something.
    branch: of a model with a controlnet: adapt the `base`, the `control` branch, or both.
    """

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    init: Literal["kaiming", "gaussian"] = "kaiming"
    branch: Literal["both", "base", "control"] = "both"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptersConfig:
    """Temporal adapters, for `method = adapters`: `train.temporal` says what they compute.

    reduction: the model's width over the bottleneck's; it must divide the width. every: blocks from one adapter to the
    next; the last block of each run of `every` gets one.
    """

    reduction: int = Field(default=8, ge=1)
    every: int = Field(default=1, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmaConfig:
    """An average of the trained weights over the steps, kept in float32 beside them.

    power: NVIDIA's, whose memory is a share `rate` of the run so far (arXiv:2312.02696, its sigma_rel): after step i,
    counted from 0, the average keeps (1 - 1 / (i + 1)) ** (gamma + 1) of itself; rate 0.1 makes that exponent 7.937.
    decay: the average keeps `decay` of itself at each step.
    """

    kind: Literal["none", "power", "decay"] = "none"
    rate: float = Field(default=0.1, gt=0, lt=0.28)
    decay: float = Field(default=0.999, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101). lr: peak learning rate, before the schedule's factor."""

    lr: float = Field(default=4.316e-5, gt=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """The learning-rate factor by optimizer step.

    lambda_linear: NVIDIA's: f_start -> f_max over `warmup` steps, then linearly to f_min at `cycle`.
    cosine: 0 -> 1 over `warmup` steps, then half a cosine to `min_lr` at the run's last step.
    constant: 0 -> 1 over `warmup` steps, then 1.
    """

    kind: Literal["lambda_linear", "cosine", "constant"] = "constant"
    warmup: int = Field(default=0, ge=0)
    f_start: float = Field(default=1e-6, ge=0)
    f_max: float = Field(default=0.5, gt=0)
    f_min: float = Field(default=0.2, ge=0)
    cycle: int = Field(default=100_000, ge=1)
    min_lr: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectiveConfig:
    """Rectified flow with conditioning frames.

    shift: s in sigma = s t / (1 + (s - 1) t). conditioning: probability of each number of clean latent
    frames, keys as strings because TOML has no others; must sum to 1. conditioning_timestep: the timestep
    (sigma scale) given to clean frames, or a negative value for "off": sigma everywhere.
    text_dropout: probability that a sample's context is the null context.
    """

    shift: float = Field(default=5.0, gt=0)
    conditioning: dict[int, float] = Field(default_factory=lambda: {0: 0.5, 1: 0.25, 2: 0.25})
    conditioning_timestep: float = 0.0001
    text_dropout: float = Field(default=0.2, ge=0, le=1)

    @field_validator("conditioning")
    @classmethod
    def _is_distribution(cls, value: dict[int, float]) -> dict[int, float]:
        if any(frames < 0 or probability < 0 for frames, probability in value.items()):
            raise ValueError("numbers of frames and probabilities must not be negative")
        if abs(sum(value.values()) - 1) > 1e-6:
            raise ValueError(f"probabilities must sum to 1, these sum to {sum(value.values()):g}")
        return value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Where metrics go besides `metrics.jsonl`. log_every: optimizer steps between records."""

    log_every: int = Field(default=1, ge=1)
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "latentline"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidationConfig:
    """The loss on samples that are never trained on, with fixed noise: comparable across steps, runs and ranks.

    every: optimizer steps between validations, the first before the first step; 0 for none. The held-out samples are
    those of a `fraction` of the source videos, chosen by the hash of each (as `latentline cache snapshot --split`
    does), or those of another `snapshot` of the cache, which may share no video with the one trained on.
    samples: at most so many of them, in the order of the snapshot. sigmas: quantiles of the training distribution of
    sigma, in (0, 1), at each of which every sample is measured. Text is never dropped; the number of conditioning
    frames is drawn once a sample from `train.objective`. With an EMA its weights are measured.
    """

    every: int = Field(default=0, ge=0)
    fraction: float | None = Field(default=None, gt=0, lt=1)
    snapshot: str | None = None
    samples: int = Field(default=16, ge=1)
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    @field_validator("sigmas")
    @classmethod
    def _are_quantiles(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or len(set(value)) < len(value) or not all(0 < quantile < 1 for quantile in value):
            raise ValueError("give different quantiles between 0 and 1")
        return value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplesConfig:
    """Sample videos during training, in `<output>/samples/step_<N>`, from held-out samples if there are any.

    every: optimizer steps between them; 0 for none. count: videos. image: begin each with the first frame of the
    sample's own video, else from text alone. num_steps, guidance, seed: as in `infer`.
    """

    every: int = Field(default=0, ge=0)
    count: int = Field(default=2, ge=1)
    image: bool = True
    num_steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=7.0, ge=0)
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One training run.

    output: the run's folder. snapshot: name or hash of a snapshot in the cache; null means `encode.snapshot`.
    steps: optimizer steps. batch_size: samples an optimizer step over all ranks. micro_batch_size: samples
    a forward pass on one rank; the rest is gradient accumulation.
    method: `lora` or `dora`, `adapters` (temporal adapters), a list of these, or `full` for all of the base. Full
    fine-tuning from projected contexts leaves the text projection as it is; `encode.text = "raw"` trains it too.
    `control` trains the control blocks of a Transfer model, and what embeds its hints; with a list, LoRA besides.
    hints: which kinds of hint a Transfer model sees, with how often each is drawn relative to the others; null takes
    the one that the cache has.
    trainable, frozen: shell-style patterns of parameter names, in diffusers' naming or NVIDIA's, that train besides
    what the method trains, or do not after all; each must match something.
    dtype: of the frozen base and of all computing; what trains, and optimizer state, are float32 always.
    base_linears: how the wide linear layers of a frozen base compute. `dtype`: in `dtype`. `fp8`: in 8-bit floating
    point with a scale a row, forward and input gradient, while adapters stay as they are; faster and a little less
    exact (benchmarks/results/fp8_*.md), for `dtype = bfloat16`, a base whole on each rank and GPUs from Ada and Hopper.
    activation: what blocks keep for the backward pass. `full` recomputes all of each block, `selective` all but
    attention, `none` nothing; `auto` measures and fills the device's memory (on a CPU: `none`).
    memory_limit_gib: what `auto` may fill; null means 92% of the device.
    parallel: `replicate` keeps the whole base on each rank, `shard` splits it over all of them with FSDP2, `hybrid`
    over each machine's; `auto` replicates what leaves half of the device's memory free, and splits what does not
    (inside machines where that is enough).
    context_parallel: ranks that share each sample, its tokens divided among them; for samples too large or too few
    to give each rank its own. It must divide the ranks and the tokens of every sample.
    checkpoint_every: optimizer steps between checkpoints. keep_last: how many are kept. async_save: write them beside
    the training from a copy in host memory, one at a time.
    loader_threads: threads that read and decode ahead of the step.
    local_cache: folder on this machine's own disk that keeps what was read from a remote cache, at most
    local_cache_gb of it (10**9 bytes) for all ranks of the machine together, which share it.
    """

    output: Place = "run"
    snapshot: str | None = None
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=1, ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    seed: Seed = 0
    dtype: Dtype = "bfloat16"
    base_linears: Literal["dtype", "fp8"] = "dtype"
    method: Method | tuple[Method, ...] = "lora"
    hints: dict[HintKind, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(default=None, min_length=1)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig)
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    ema: EmaConfig = Field(default_factory=EmaConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    activation: Literal["auto", "none", "selective", "full"] = "auto"
    memory_limit_gib: float | None = Field(default=None, gt=0)
    parallel: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    context_parallel: int = Field(default=1, ge=1, le=8)
    checkpoint_every: int = Field(default=100, ge=1)
    keep_last: int = Field(default=3, ge=1)
    async_save: bool = False
    loader_threads: int = Field(default=4, ge=1)
    local_cache: Place | None = None
    local_cache_gb: float = Field(default=100.0, gt=0)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The method or methods, sorted."""
        return (self.method,) if isinstance(self.method, str) else tuple(sorted(self.method))

    @field_validator("method")
    @classmethod
    def _go_together(cls, value: Method | tuple[Method, ...]) -> Method | tuple[Method, ...]:
        methods = [value] if isinstance(value, str) else list(value)
        if not methods or len(set(methods)) < len(methods):
            raise ValueError("name one method or several different ones")
        if "full" in methods and len(methods) > 1:
            raise ValueError("full trains every weight of the base, so it goes with no other method")
        if {"lora", "dora"} <= set(methods):
            raise ValueError("dora is lora with magnitudes; choose one of the two")
        return value
