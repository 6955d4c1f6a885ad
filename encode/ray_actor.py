"""What runs in Ray's processes: the encoders, one a GPU, and the ledger that outlives them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.util.metrics import Counter, Histogram

from encode.config import EncodeConfig
from encode.worker import Oversight, ShardReport, ShardWorker
from manifests.config import ModelConfig
from manifests.errors import Preempted
from manifests.plan import ShardTask

SHARD_SECONDS = [1, 3, 10, 30, 100, 300, 1000, 3000]


class Ledger:
    """Remembers what each encoder is at, so that a death can be laid to the entry that caused it."""

    def __init__(self) -> None:
        self._marks: dict[str, tuple[str, tuple[str, ...], float]] = {}

    def mark(self, encoder: str, shard_id: str, keys: Sequence[str]) -> None:
        """An encoder starts on these entries of a shard; on none: it is between entries, or committing."""
        self._marks[encoder] = shard_id, tuple(keys), time.monotonic()

    def last(self, encoder: str) -> tuple[str, tuple[str, ...]] | None:
        """(shard, keys) of an encoder's last mark."""
        mark = self._marks.get(encoder)
        return mark and mark[:2]

    def ages(self) -> dict[str, float]:
        """Seconds since each encoder's last mark."""
        now = time.monotonic()
        return {encoder: now - seconds for encoder, (*_, seconds) in self._marks.items()}


class Encoder:
    """A `ShardWorker` in a Ray actor. `expect` and `stop` run beside `run`, in a concurrency group of their own."""

    def __init__(self, name: str, ledger: Any) -> None:
        self._name = name
        self._ledger = ledger
        self._stop = threading.Event()
        self._worker: ShardWorker | None = None

    def prepare(
        self, model: ModelConfig, config: EncodeConfig, footer: dict[str, Any], num_threads: int
    ) -> dict[str, Any]:
        """Open the cache; not in the constructor, whose errors would reach the driver without their type."""
        torch.set_num_threads(num_threads)
        self._metrics = _Metrics()
        self._worker = ShardWorker(model, config, footer)
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def run(self, task: ShardTask, oversight: Oversight) -> ShardReport:
        assert self._worker is not None
        shard_id = task.shard_id
        self._mark(shard_id, ())
        oversight = replace(oversight, check=self._check, starting=lambda keys: self._mark(shard_id, keys))
        report = self._worker.run(task, oversight)
        self._metrics.add(report)
        return report

    @ray.method(concurrency_group="control")
    def expect(self, task: ShardTask) -> None:
        """Say which task is queued behind the one in work."""
        assert self._worker is not None
        self._worker.expect(task)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Abandon the task in work between two entries, and every later one."""
        self._stop.set()

    def _check(self) -> None:
        if self._stop.is_set():
            raise Preempted("the driver has stopped")

    def _mark(self, shard_id: str, keys: Sequence[str]) -> None:
        ray.get(self._ledger.mark.remote(self._name, shard_id, keys))


class _Metrics:
    """Ray's own metrics, which its agents export to Prometheus as `ray_latentline_...`."""

    def __init__(self) -> None:
        tags = ("kind",)
        self._entries = Counter("latentline_entries_encoded", "Entries encoded and committed.", tags)
        self._bytes = Counter("latentline_bytes_encoded", "Bytes of tensors encoded.", tags)
        self._quarantined = Counter("latentline_entries_quarantined", "Entries quarantined.", tags)
        self._wait = Counter("latentline_decode_wait_seconds", "Seconds encoders waited for frames.", tags)
        self._busy = Counter("latentline_encode_seconds", "Seconds encoders encoded.", tags)
        self._shard = Histogram("latentline_shard_seconds", "Seconds a shard took.", SHARD_SECONDS, tags)

    def add(self, report: ShardReport) -> None:
        tags = {"kind": report.kind}
        counts = {
            self._entries: report.entries * report.committed,
            self._bytes: report.bytes,
            self._quarantined: report.quarantined,
            self._wait: report.wait_seconds,
            self._busy: report.encode_seconds,
        }
        for counter, count in counts.items():
            if count:
                counter.inc(count, tags)
        self._shard.observe(report.seconds, tags)
