"""The training run: snapshot in, trained weights out, the same however often it was interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.family import find_family
from manifests.mixture import Mixture
from manifests.order import order_of
from manifests.snapshot import Snapshot
from manifests.store import Store
from train import parallel
from train.config import TrainConfig
from train.model import check
from train.preempt import stop_on_signal
from train.run import MakeSamples, OnCheckpoint, Run
from train.validate import split


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves. adapter: the file of LoRA or DoRA, else that of the other trained weights.

    ema: the same of the average, None without one. loss: of the last step, None if there was nothing left to do.
    resumed_from: the step the run continued from, 0 for a fresh one. seconds: of this process's part.
    """

    adapter: Path
    ema: Path | None
    steps: int
    samples_consumed: int
    resumed_from: int
    loss: float | None
    seconds: float


def train(
    model: ModelConfig,
    config: TrainConfig,
    snapshot: Snapshot,
    store: Store,
    *,
    mixture: Mixture = Mixture(),
    held_out: Snapshot | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    make_samples: MakeSamples | None = None,
    profile: bool = False,
) -> TrainResult:
    """Train on a snapshot and write what was trained to `<output>/adapter`, its average to `<output>/adapter-ema`.

    Runs on the ranks torchrun describes, or alone. Continues from the newest good checkpoint in `config.output`.
    mixture: how often each dataset and caption is drawn. held_out: samples to validate on, instead of what
    `config.validation` holds out. make_samples: for `config.samples`. profile: write `<output>/profile/trace.json`.
    On SIGTERM or SIGUSR1 all ranks finish the step, write a checkpoint and raise `Preempted`. Raises `StaleCacheError`
    if the snapshot was made with other weights than the model's, `UsageError` for settings that cannot work,
    `LatentlineError` for a loss or gradient that is not finite.
    """
    check(model, config, snapshot)
    if held_out is None:
        snapshot, held_out = split(snapshot, config.validation, store)
    order_of(snapshot, config.seed, mixture)
    if held_out is not None:
        check(model, config, held_out)
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"train.output {config.output!r}: cannot be a folder to write to: {error.strerror}") from error
    family = find_family("train", model)
    with parallel.join(config.context_parallel) as ranks, stop_on_signal() as stop:
        run = Run(
            model, config, snapshot, held_out, store, family, ranks, stop,
            mixture=mixture, on_checkpoint=on_checkpoint, make_samples=make_samples, profile=profile,
        )  # fmt: skip
        return TrainResult(**run.run())
