"""The training run: snapshot in, adapter out, the same adapter however often it was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType

import torch

from manifests.config import ModelConfig
from manifests.errors import LatentlineError, Preempted, UsageError
from manifests.family import find_family
from manifests.mixture import Mixture
from manifests.order import order_of
from manifests.snapshot import Snapshot
from manifests.store import Store
from train import checkpoint, parallel
from train.adapters import WEIGHTS_NAME, adapter_parameters, save_adapter
from train.attention import use_kernel
from train.checkpoint import Progress
from train.config import TrainConfig
from train.context_parallel import sharing
from train.flops import throughput
from train.loader import Loader, MicroBatch
from train.metrics import Meter, Metrics, check_trackers
from train.model import build
from train.parallel import Ranks
from train.preempt import StopFlag, stop_on_signal
from train.profiler import traced
from train.progress import TrainProgress
from train.schedule import effective_lr

OnCheckpoint = Callable[[int, Path], None]
"""Called on the main rank after each checkpoint, with the step and the folder its adapter lies in."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves. adapter: the file. loss: of the last step, None if there was nothing left to do.

    resumed_from: the step the run continued from, 0 for a fresh one. seconds: of this process's part.
    """

    adapter: Path
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
    on_checkpoint: OnCheckpoint | None = None,
    profile: bool = False,
) -> TrainResult:
    """Train an adapter on a snapshot and write it to `<output>/adapter/pytorch_lora_weights.safetensors`.

    Runs on the ranks torchrun describes, or alone. Continues from the newest good checkpoint in `config.output`.
    mixture: how often each dataset and caption is drawn. On SIGTERM or SIGUSR1 all ranks finish the step, write a
    checkpoint and raise `Preempted`. profile: write `<output>/profile/trace.json`. Raises `StaleCacheError` if the
    snapshot was made with other weights than the model's, `UsageError` for settings that cannot work,
    `LatentlineError` for a loss or gradient that is not finite.
    """
    family = find_family("train", model)
    check_trackers(config.track)
    family.check_snapshot(snapshot, model)
    order_of(snapshot, config.seed, mixture)
    family.check_objective(config.objective, snapshot.shapes)
    family.check_context_parallel(config.context_parallel, model, snapshot.shapes)
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"train.output {config.output!r}: cannot be a folder to write to: {error.strerror}") from error
    with parallel.join(config.context_parallel) as ranks, stop_on_signal() as stop:
        return _Run(model, config, snapshot, store, family, ranks, stop, mixture, on_checkpoint, profile).run()


class _Run:
    """One process's part of a run: the model, the optimizer and the loop over steps."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        snapshot: Snapshot,
        store: Store,
        family: ModuleType,
        ranks: Ranks,
        stop: StopFlag,
        mixture: Mixture,
        on_checkpoint: OnCheckpoint | None,
        profile: bool,
    ) -> None:
        self.config = config
        self.snapshot = snapshot
        self.store = store
        self.family = family
        self.ranks = ranks
        self.stop = stop
        self.stopping = False  # what all ranks agreed on at the last step; `stop` is this rank's alone
        self.mixture = mixture
        self.on_checkpoint = on_checkpoint
        self.profile = profile
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.settings = checkpoint.fixed_settings(
            config, snapshot_hash=snapshot.hash, base_digest=family.base_digest(model), mixture=mixture
        )
        self.built = build(model, config, family, ranks, snapshot)
        self.transformer = self.built.transformer
        self.parameters = list(adapter_parameters(self.transformer).values())
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=ranks.device.type == "cuda",
        )

    def run(self) -> TrainResult:
        started = perf_counter()
        first = self.resume().step
        loss = None
        metrics = None
        if self.ranks.is_main:
            metrics = Metrics(self.output, self.config.track, done=first, settings=dataclasses.asdict(self.config))
        loader = Loader(
            self.snapshot,
            self.store,
            self.config,
            self.family,
            rank=self.ranks.data_rank,
            world=self.ranks.data_world,
            device=self.ranks.device,
            mixture=self.mixture,
        )
        try:
            with (
                loader,
                use_kernel(self.built.kernel),
                TrainProgress(steps=self.config.steps, done=first, quiet=not self.ranks.is_main) as shown,
                traced(self.output / "profile" if self.profile and self.ranks.is_main else None) as tick,
            ):
                shown.say(self.built.describe())
                if first:
                    shown.say(f"resuming {self.output} from step {first}")
                meter = Meter()
                for step, values in self.steps(loader, first):
                    tick()
                    loss = values["loss"]
                    meter.add(samples=self.config.batch_size, waited=loader.wait_seconds)
                    last = step == self.config.steps
                    if metrics is not None and (last or step % self.config.track.log_every == 0):
                        epoch = step * self.config.batch_size / self.snapshot.num_samples
                        record = {"step": step, "epoch": epoch, **values, **self.speed(meter)}
                        metrics.record(record)
                        shown.show(record)
                    self.maybe_checkpoint(step)
        finally:
            if metrics is not None:
                metrics.close()
        adapter = self.output / "adapter"
        if self.ranks.is_main:
            save_adapter(adapter, self.transformer)
        parallel.barrier(self.ranks)
        return TrainResult(
            adapter=adapter / WEIGHTS_NAME,
            steps=self.config.steps,
            samples_consumed=self.config.steps * self.config.batch_size,
            resumed_from=first,
            loss=loss,
            seconds=perf_counter() - started,
        )

    def resume(self) -> Progress:
        """Load the newest good checkpoint, chosen by the main rank; a fresh run starts at zero."""
        step = 0
        if self.ranks.is_main:
            path = checkpoint.latest_good(self.checkpoints)
            step = checkpoint.step_of(path) if path else 0
        step = parallel.from_main(step, self.ranks)
        if step == 0:
            return Progress(0, 0)
        if step > self.config.steps:
            raise UsageError(
                f"train.steps is {self.config.steps} but {str(self.output)!r} is at step {step} already; "
                "raise it, or choose another train.output"
            )
        path = checkpoint.at_step(self.checkpoints, step)
        return checkpoint.load(path, self.transformer, self.optimizer, self.settings)

    def steps(self, loader: Loader, first: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Do the optimizer steps from `first` on; yield (steps done, loss, learning rate and gradient norm)."""
        config = self.config
        for step, micro_batches in loader.steps(first, config.steps):
            try:
                losses = self.backward(step, micro_batches)
            except torch.OutOfMemoryError as error:
                raise LatentlineError(self.built.out_of_memory(config)) from error
            parallel.sum_gradients(self.parameters, self.ranks)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.grad_clip))
            if not math.isfinite(norm):
                raise LatentlineError(
                    f"step {step + 1}: the gradient is not finite though the loss is; samples "
                    f"{', '.join(self.sample_ids(step))}"
                )
            lr = effective_lr(config.optimizer, config.schedule, step, steps=config.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            yield step + 1, {"loss": math.fsum(losses) / len(losses), "lr": lr, "grad_norm": norm}

    def backward(self, step: int, micro_batches: Iterator[MicroBatch]) -> list[float]:
        """Accumulate this rank's gradients and return the loss of every sample of the step, of all ranks.

        The gradient is that of the mean over the global batch. A stop asked of any rank becomes known to all.
        """
        size = self.config.batch_size
        shared = torch.zeros(size + 1, device=self.ranks.device)
        for micro_batch in micro_batches:
            slot = micro_batch.slot
            self.seed_dropout(slot.positions[0])
            with sharing(self.ranks.context):
                losses_B = self.family.loss(self.transformer, micro_batch.inputs, self.config.objective)
                weights_B = losses_B.new_tensor(slot.weights)
                (losses_B * weights_B).sum().backward()
            if slot.weights[0] > 0 and self.ranks.reports_losses:
                shared[[position - step * size for position in slot.positions]] = losses_B.detach()
        shared[size] = float(self.stop.requested)
        *losses, stops = parallel.sum_over_ranks(shared, self.ranks).tolist()
        self.stopping = stops > 0
        if not all(map(math.isfinite, losses)):
            bad = [name for name, loss in zip(self.sample_ids(step), losses, strict=True) if not math.isfinite(loss)]
            raise LatentlineError(f"step {step + 1}: the loss of sample {', '.join(bad)} is not finite")
        return losses

    def maybe_checkpoint(self, step: int) -> None:
        """Write a checkpoint if one is due or a stop was asked for; then leave if it was."""
        config = self.config
        if step % config.checkpoint_every == 0 or step == config.steps or self.stopping:
            if self.ranks.is_main:
                progress = Progress(step, step * config.batch_size)
                path = checkpoint.save(
                    self.checkpoints,
                    progress,
                    self.transformer,
                    self.optimizer,
                    self.settings,
                    keep_last=config.keep_last,
                )
                if self.on_checkpoint is not None:
                    self.on_checkpoint(step, path)
            parallel.barrier(self.ranks)
        if self.stopping and step < config.steps:
            raise Preempted(
                f"stopped by a signal after step {step} of {config.steps}; run the same command to continue"
            )

    def seed_dropout(self, position: int) -> None:
        """Make adapter dropout a function of the position in the order, so that it survives a resume.

        Ranks that share the sample draw for tokens of their own.
        """
        if self.config.lora.dropout > 0:
            part = self.ranks.context.rank if self.ranks.context else 0
            name = hashlib.sha256(f"dropout/{self.config.seed}/{position}/{part}".encode()).digest()
            torch.manual_seed(int.from_bytes(name[:8], "little", signed=True))

    def sample_ids(self, step: int) -> list[str]:
        """Return the ids of a step's samples, in the global order."""
        size = self.config.batch_size
        order = order_of(self.snapshot, self.config.seed, self.mixture)
        return [self.snapshot.sample(order[step * size + i][1]).sample_id for i in range(size)]

    def speed(self, meter: Meter) -> dict[str, float]:
        """Speed since the last record, and the peak memory so far."""
        speed = meter.take()
        device = self.ranks.device
        speed |= throughput(self.built.flops_per_sample, speed["samples_per_second"], self.ranks.world, device)
        if device.type == "cuda":
            speed["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        return speed
