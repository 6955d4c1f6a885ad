"""One process's part of a training run: the model, the optimizer and the loop over steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import torch

from manifests.config import ModelConfig
from manifests.disk import writing
from manifests.errors import LatentlineError, Preempted, UsageError
from manifests.mixture import Mixture
from manifests.order import order_of
from manifests.snapshot import Snapshot
from manifests.store import Store
from train import checkpoint, parallel
from train.attention import use_kernel
from train.checkpoint import Progress, Weights
from train.config import TrainConfig
from train.context_parallel import sharing
from train.ema import Ema
from train.flops import throughput
from train.loader import Loader, MicroBatch
from train.methods import computing, seed_dropout
from train.metrics import Meter, Metrics
from train.model import DTYPES, build
from train.parallel import Ranks
from train.preempt import StopFlag
from train.profiler import traced
from train.progress import TrainProgress
from train.saver import OnCheckpoint, Saver
from train.schedule import effective_lr
from train.trained import trained_parameters
from train.validate import Validation

MakeSamples = Callable[[torch.nn.Module, int, Ranks], Path | None]
"""Called on every rank with the transformer, not training, and the step; the main rank returns a picture, or None."""

ADAPTER_FOLDER = "adapter"
EMA_FOLDER = "adapter-ema"


class Run:
    """One process's part of a run."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        snapshot: Snapshot,
        held_out: Snapshot | None,
        store: Store,
        family: ModuleType,
        ranks: Ranks,
        stop: StopFlag,
        *,
        mixture: Mixture,
        on_checkpoint: OnCheckpoint | None,
        make_samples: MakeSamples | None,
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
        self.make_samples = make_samples if config.samples.every else None
        self.profile = profile
        self.output = Path(config.output)
        self.checkpoints = self.output / "checkpoints"
        self.dtype = DTYPES[config.dtype]
        self.settings = checkpoint.fixed_settings(
            config, snapshot_hash=snapshot.hash, base_digest=family.base_digest(model), mixture=mixture
        )
        self.built = build(model, config, family, ranks, snapshot)
        self.transformer = self.built.transformer
        trained = trained_parameters(self.transformer)
        self.parameters = list(trained.values())
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in parallel.by_layout(self.parameters)],
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=ranks.device.type == "cuda",
        )
        self.ema = None if config.ema.kind == "none" else Ema(config.ema, trained)
        self.validation = None
        if held_out is not None and config.validation.every:
            self.validation = Validation(held_out, store, config, family, ranks)
        self.saver = Saver(
            self.checkpoints,
            self.settings,
            keep_last=config.keep_last,
            background=config.async_save,
            on_checkpoint=on_checkpoint,
        )

    def run(self) -> dict[str, Any]:
        """Do the steps that are left; return the fields of a `TrainResult`."""
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
                self.saver,
                use_kernel(self.built.kernel),
                TrainProgress(steps=self.config.steps, done=first, quiet=not self.ranks.is_main) as shown,
                traced(self.output / "profile" if self.profile and self.ranks.is_main else None) as tick,
            ):
                shown.say(self.built.describe())
                if first:
                    shown.say(f"resuming {self.output} from step {first}")
                elif self.validation is not None:
                    self.look(0, {"step": 0, "epoch": 0.0}, metrics, shown)
                meter = Meter()
                for step, values in self.steps(loader, first):
                    tick()
                    loss = values["loss"]
                    meter.add(samples=self.config.batch_size, waited=loader.wait_seconds)
                    looked = self.is_due(step, self.config.validation.every if self.validation else 0)
                    if looked or self.is_due(step, self.config.track.log_every):
                        epoch = step * self.config.batch_size / self.snapshot.num_samples
                        record = {"step": step, "epoch": epoch, **values, **self.speed(meter)}
                        meter.pause(self.look(step, record, metrics, shown))
                    meter.pause(self.show_samples(step, metrics, shown))
                    self.maybe_checkpoint(step)
        finally:
            if metrics is not None:
                metrics.close()
        adapter, ema = self.export()
        return {
            "adapter": adapter,
            "ema": ema,
            "steps": self.config.steps,
            "samples_consumed": self.config.steps * self.config.batch_size,
            "resumed_from": first,
            "loss": loss,
            "seconds": perf_counter() - started,
        }

    def is_due(self, step: int, every: int) -> bool:
        """Say whether something done every so many steps, and at the end, is to be done now; 0 means never."""
        return bool(every) and (step % every == 0 or step == self.config.steps)

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
        return checkpoint.load(path, self.transformer, self.optimizer, self.settings, self.ema)

    def steps(self, loader: Loader, first: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Do the optimizer steps from `first` on; yield (steps done, loss, learning rate and gradient norm)."""
        config = self.config
        for step, micro_batches in loader.steps(first, config.steps):
            try:
                losses = self.backward(step, micro_batches)
            except torch.OutOfMemoryError as error:
                raise LatentlineError(self.built.out_of_memory(config)) from error
            parallel.sum_gradients(self.parameters, self.ranks)
            norm = parallel.clip_gradients(self.parameters, config.optimizer.grad_clip)
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
            if self.ema is not None:
                self.ema.update(step)
            yield step + 1, {"loss": math.fsum(losses) / len(losses), "lr": lr, "grad_norm": norm}

    def backward(self, step: int, micro_batches: Iterator[MicroBatch]) -> list[float]:
        """Accumulate this rank's gradients and return the loss of every sample of the step, of all ranks.

        The gradient is that of the mean over the global batch. A stop asked of any rank becomes known to all.
        """
        size = self.config.batch_size
        shared = torch.zeros(size + 1, device=self.ranks.device)
        for micro_batch in micro_batches:
            slot = micro_batch.slot
            seed_dropout(self.config, slot.positions[0], self.ranks)
            with sharing(self.ranks.context):
                with computing(self.config, self.dtype, self.ranks.device):
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

    def look(self, step: int, record: dict[str, Any], metrics: Metrics | None, shown: TrainProgress) -> float:
        """Validate if it is time, and record the step on the main rank; return the seconds validation took."""
        started = perf_counter()
        if self.validation is not None and self.is_due(step, self.config.validation.every):
            with self.averaged():
                record |= self.validation.run(self.transformer, self.dtype)
            shown.say(f"step {step}: validation loss {record['validation/loss']:.4f}")
        seconds = perf_counter() - started
        if metrics is not None:
            metrics.record(record)
            if "loss" in record:
                shown.show(record)
        return seconds

    def show_samples(self, step: int, metrics: Metrics | None, shown: TrainProgress) -> float:
        """Make sample videos if it is time; every rank enters. Return the seconds they took."""
        if self.make_samples is None or not self.is_due(step, self.config.samples.every):
            return 0.0
        started = perf_counter()
        self.transformer.eval()
        with self.averaged(), torch.no_grad(), computing(self.config, self.dtype, self.ranks.device):
            picture = self.make_samples(self.transformer, step, self.ranks)
        self.transformer.train()
        if metrics is not None and picture is not None:
            metrics.picture(step, "samples", picture)
            shown.say(f"step {step}: sample videos in {picture.parent}")
        return perf_counter() - started

    def averaged(self) -> AbstractContextManager[None]:
        """The average in the model's place, where there is one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def maybe_checkpoint(self, step: int) -> None:
        """Save a checkpoint if one is due or a stop was asked for; then leave if it was."""
        config = self.config
        if self.is_due(step, config.checkpoint_every) or self.stopping:
            self.saver.finish()  # before the next copy is made: one at a time in host memory
            state = checkpoint.collect(self.transformer, self.optimizer, self.ema, keep=self.ranks.is_main)
            if self.ranks.is_main:
                self.saver.save(Progress(step, step * config.batch_size), state)
                if step == config.steps or self.stopping:
                    self.saver.finish()
            parallel.barrier(self.ranks)
        if self.stopping and step < config.steps:
            raise Preempted(
                f"stopped by a signal after step {step} of {config.steps}; run the same command to continue"
            )

    def export(self) -> tuple[Path, Path | None]:
        """Write what was trained, and its average; every rank enters. Return the file of each."""
        keep = self.ranks.is_main
        adapter = self._write(checkpoint.collect_weights(self.transformer, keep=keep), ADAPTER_FOLDER)
        ema = None
        if self.ema is not None:
            with self.ema.applied():
                weights = checkpoint.collect_weights(self.transformer, keep=keep)
            ema = self._write(weights, EMA_FOLDER)
        parallel.barrier(self.ranks)
        return adapter, ema

    def _write(self, weights: Weights, name: str) -> Path:
        if self.ranks.is_main:
            with writing(self.output / name):
                weights.write(self.output / name)
        return self.output / name / weights.file_name

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
