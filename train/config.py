"""The `train` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from manifests.config import STRICT, Dtype


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """The adapter, for `method = lora | dora`.

    rank, alpha: as in LoRA (arXiv:2106.09685); the update is scaled by alpha / rank.
    targets: module names, by suffix; empty means the family's default. Each must match something.
    """

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    init: Literal["kaiming", "gaussian"] = "kaiming"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101). lr: peak learning rate, before the schedule's factor."""

    lr: float = Field(default=4.316e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
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
class TrainConfig:
    """One training run.

    output: the run's folder. snapshot: name or hash of a snapshot in the cache; null means `encode.snapshot`.
    steps: optimizer steps. batch_size: samples an optimizer step over all ranks. micro_batch_size: samples
    a forward pass on one rank; the rest is gradient accumulation.
    dtype: of the frozen base and the activations; adapters and optimizer state are float32 always.
    activation: what blocks keep for the backward pass. `full` recomputes all of each block, `selective` all but
    attention, `none` nothing; `auto` measures and fills the device's memory (on a CPU: `none`).
    memory_limit_gib: what `auto` may fill; null means 92% of the device.
    parallel: `replicate` keeps the whole base on each rank, `shard` splits it over all of them with FSDP2, `hybrid`
    over each machine's; `auto` replicates what leaves half of the device's memory free, and splits what does not
    (inside machines where that is enough).
    context_parallel: ranks that share each sample, its tokens divided among them; for samples too large or too few
    to give each rank its own. It must divide the ranks and the tokens of every sample.
    checkpoint_every: optimizer steps between checkpoints. keep_last: how many are kept.
    loader_threads: threads that read and decode ahead of the step.
    local_cache: folder on this machine's own disk that keeps what was read from a remote cache, at most
    local_cache_gb of it (10**9 bytes) for all ranks of the machine together, which share it.
    """

    output: str = "run"
    snapshot: str | None = None
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=1, ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    seed: int = 0
    dtype: Dtype = "bfloat16"
    method: Literal["lora", "dora"] = "lora"
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    activation: Literal["auto", "none", "selective", "full"] = "auto"
    memory_limit_gib: float | None = Field(default=None, gt=0)
    parallel: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    context_parallel: int = Field(default=1, ge=1, le=8)
    checkpoint_every: int = Field(default=100, ge=1)
    keep_last: int = Field(default=3, ge=1)
    loader_threads: int = Field(default=4, ge=1)
    local_cache: str | None = None
    local_cache_gb: float = Field(default=100.0, gt=0)
    track: TrackConfig = Field(default_factory=TrackConfig)
