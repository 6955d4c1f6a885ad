"""From a snapshot to micro-batches: which samples a rank sees in a step, read ahead of need.

The plan of a step is a pure function of (order, step, batch size, ranks): positions [step B, (step + 1) B) of
the global order, put in buckets of equal latent shape, dealt to the ranks in stripes. Every rank can compute
every rank's plan, so all of them run the same number of micro-batches; a rank that has fewer fills up with
a sample of weight zero. The one thing to remember between runs is how many samples were consumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType, TracebackType

import torch

from manifests.errors import LatentlineError
from manifests.mixture import Mixture
from manifests.order import order_of
from manifests.places import Location
from manifests.shards import read_tensors
from manifests.snapshot import Sample, Snapshot
from manifests.store import Store
from train.config import TrainConfig
from train.hints import HintReader

_MICRO_BATCHES_AHEAD = 2
"""Micro-batches kept ready a loader thread."""


@dataclass(frozen=True)
class Slot:
    """One micro-batch of one rank before it is read.

    positions: in the global order, of equal latent shape. weights: what each sample's loss counts in the step;
    1 / batch size, or 0 for padding.
    """

    positions: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank.

    inputs: the family's tensors, stacked, on the device. sample_ids: of each row, for messages.
    """

    slot: Slot
    inputs: dict[str, torch.Tensor]
    sample_ids: tuple[str, ...]


def plan_step(shapes: list[tuple[int, ...]], *, first: int, micro_batch_size: int, rank: int, world: int) -> list[Slot]:
    """Return the micro-batches of one rank in one step; all ranks get equally many.

    shapes: latent shapes of the step's samples, in the global order. first: position of the first of them.
    """
    per_rank = [_pack(shapes, list(_stripe(shapes, r, world)), micro_batch_size) for r in range(world)]
    num_slots = max(len(chunks) for chunks in per_rank)
    weight = 1.0 / len(shapes)
    slots = [Slot(tuple(first + index for index in chunk), (weight,) * len(chunk)) for chunk in per_rank[rank]]
    padding = Slot((slots[-1].positions[0] if slots else first,), (0.0,))
    return slots + [padding] * (num_slots - len(slots))


def _stripe(shapes: list[tuple[int, ...]], rank: int, world: int) -> list[int]:
    """Deal the samples bucket by bucket, so that ranks work on like shapes at the same time."""
    buckets = {shape: number for number, shape in reversed(list(enumerate(shapes)))}
    return sorted(range(len(shapes)), key=lambda index: (buckets[shapes[index]], index))[rank::world]


def _pack(shapes: list[tuple[int, ...]], indices: list[int], size: int) -> list[list[int]]:
    chunks: list[list[int]] = []
    for index in indices:
        if chunks and len(chunks[-1]) < size and shapes[chunks[-1][0]] == shapes[index]:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


class Loader:
    """Micro-batches of one rank, step after step, read by threads a bounded number ahead.

    wait_seconds: time the training loop has spent waiting for data, in all. Use as a context manager: leaving
    it stops the threads.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        store: Store,
        config: TrainConfig,
        family: ModuleType,
        *,
        rank: int,
        world: int,
        device: torch.device,
        mixture: Mixture = Mixture(),
    ) -> None:
        self.snapshot = snapshot
        self.store = store
        self.config = config
        self.family = family
        self.rank = rank
        self.world = world
        self.device = device
        self.wait_seconds = 0.0
        self.mixture = mixture
        self.order = order_of(snapshot, config.seed, mixture)
        self._pool = ThreadPoolExecutor(config.loader_threads, "loader", self._on_device)
        self.hints = HintReader(snapshot, store, config, family)
        self._null_context = self._pool.submit(self._read, snapshot.null_context, "context")

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
        """Yield (step, its micro-batches) for steps first to last - 1; take each step's in full.

        An error in a reading thread is raised where its micro-batch would be.
        """
        ahead: deque[Future[MicroBatch]] = deque()
        slots = (slot for step in range(first, last) for slot in self.plan(step))
        limit = self.config.loader_threads * _MICRO_BATCHES_AHEAD

        def fill() -> None:
            while len(ahead) < limit and (slot := next(slots, None)) is not None:
                visits = [self.order[position] for position in slot.positions]
                ahead.append(self._pool.submit(self._load, slot, visits))

        def take(count: int) -> Iterator[MicroBatch]:
            for _ in range(count):
                fill()
                start = perf_counter()
                micro_batch = ahead.popleft().result()
                self.wait_seconds += perf_counter() - start
                yield self._to_device(micro_batch)

        for step in range(first, last):
            yield step, take(len(self.plan(step)))

    def plan(self, step: int) -> list[Slot]:
        """Return this rank's micro-batches of a 0-based step."""
        size = self.config.batch_size
        indices = [self.order[position][1] for position in range(step * size, (step + 1) * size)]
        return plan_step(
            [self.snapshot.sample(index).latents_shape for index in indices],
            first=step * size,
            micro_batch_size=self.config.micro_batch_size,
            rank=self.rank,
            world=self.world,
        )

    def _load(self, slot: Slot, visits: list[tuple[int, int]]) -> MicroBatch:
        examples, sample_ids = [], []
        for epoch, index in visits:
            sample = self.snapshot.sample(index)
            drawn = self.family.draw(
                self.config.seed, epoch, sample.sample_id, sample.latents_shape, self.config.objective
            )
            latents = self._read(sample.latents, "latents")
            try:
                latents = self.family.normalise(latents, self.snapshot.fingerprints["latents"])
            except LatentlineError as error:
                raise LatentlineError(f"sample {sample.sample_id} ({sample.source}): {error}") from error
            context = self._null_context.result() if drawn.drop_text else self._context(sample, epoch)
            hints = self.hints.of(sample, epoch, self.config.seed)
            examples.append(self.family.example(latents, context, drawn, **hints))
            sample_ids.append(sample.sample_id)
        inputs = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        if self.device.type == "cuda":
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        return MicroBatch(slot, inputs, tuple(sample_ids))

    def _context(self, sample: Sample, epoch: int) -> torch.Tensor:
        """The context of the caption that this visit draws."""
        names = sorted(sample.contexts)
        chosen = self.mixture.caption(self.config.seed, epoch, sample.sample_id, sample.dataset, names)
        return self._read(sample.contexts[names[chosen]], "context")

    def _on_device(self) -> None:
        """Pin memory for this rank's GPU: the current device is each thread's own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _read(self, location: Location, name: str) -> torch.Tensor:
        return read_tensors(self.store, location)[name]

    def _to_device(self, micro_batch: MicroBatch) -> MicroBatch:
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in micro_batch.inputs.items()}
        return MicroBatch(micro_batch.slot, inputs, micro_batch.sample_ids)
