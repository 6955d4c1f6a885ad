"""How far a job is and how fast it goes: from the newest plan, what is committed of it, and its events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import Cache
from manifests.events import read_events
from manifests.plan import read_plan
from manifests.schema import KINDS, OK, QUARANTINED, SAMPLE_KINDS

_ENDED = ("finished", "preempted", "failed")
_RATE_SECONDS = 600.0
_MEASURED_SHARDS = 64


@dataclass(frozen=True)
class Throughput:
    """Wall seconds an encoder took for an entry, from the footers of the manifests of `entries` entries."""

    seconds_per_entry: float
    entries: int
    device: str


def newest_job(cache: Cache) -> dict[str, Any] | None:
    """Say how far the newest plan of a cache is; None if it has no plan.

    running: drivers that have begun and not said how they ended. entries_per_hour: latents, over the last ten minutes
    of the job's events; None without any. remaining_seconds: at that rate.
    """
    plans = [info for info in cache.store.list("plans") if info.path.endswith(".parquet")]
    if not plans:
        return None
    newest = max(plans, key=lambda info: info.modified)
    plan_id = newest.path.removeprefix("plans/").removesuffix(".parquet")
    table = read_plan(cache, plan_id).table
    result: dict[str, Any] = {"plan": plan_id}
    left = 0
    for kind in KINDS:
        rows = table.filter(pc.equal(table["kind"], kind))
        if kind not in SAMPLE_KINDS and not len(rows):
            continue
        done = rows.filter(pc.is_in(rows["key"], value_set=cache.index(kind, ["key"])["key"]))
        result[kind] = f"{len(done)} of {len(rows)}"
        left += len(rows) - len(done) if kind == "latents" else 0
    events = read_events(cache.store, plan_id)
    last = {event["driver"]: event for event in events}
    ended = {event["driver"] for event in events if event["event"] in _ENDED}
    rate = _rate(events)
    return result | {
        "running": len(set(last) - ended),
        "last_event_seconds": round(time.time() - events[-1]["time"]) if events else None,
        "entries_per_hour": rate,
        "remaining_seconds": round(left / rate * 3600) if rate and left else None,
    }


def throughput_of(cache: Cache, kind: str, like: Mapping[str, Any]) -> Throughput | None:
    """Measure entries of a kind and, but for contexts, of the same frames, height and width; None if nothing is known.

    Where several devices made them, the one that made most counts.
    """
    columns = ["status", "num_frames", "height", "width", "shard_id"]
    rows = cache.rows(kind, columns)
    rows = rows.filter(pc.equal(rows["status"], OK))
    if kind != "context":
        for name in ("num_frames", "height", "width"):
            rows = rows.filter(pc.equal(rows[name], like[name]))
    shards: pa.Array = pc.unique(rows["shard_id"])
    step = max(1, len(shards) // _MEASURED_SHARDS)
    measured: dict[str, list[tuple[float, int]]] = {}
    for shard_id in shards.to_pylist()[::step]:
        table, footer = cache.manifest(kind, shard_id)
        good = len(table) - (pc.sum(pc.equal(table["status"], QUARANTINED)).as_py() or 0)
        if footer.get("seconds") and good:
            measured.setdefault(footer.get("device") or "a CPU", []).append((footer["seconds"], good))
    if not measured:
        return None
    device, values = max(measured.items(), key=lambda item: sum(entries for _, entries in item[1]))
    entries = sum(count for _, count in values)
    return Throughput(sum(seconds for seconds, _ in values) / entries, entries, device)


def _rate(events: list[dict[str, Any]]) -> float | None:
    """Latents an hour over the last minutes of events."""
    shards = [event for event in events if event["event"] == "shard" and event["kind"] == "latents"]
    if not shards:
        return None
    end = shards[-1]["time"]
    recent = [event for event in shards if event["time"] > end - _RATE_SECONDS]
    begin = min(event["time"] - event["seconds"] for event in recent)
    return round(sum(event["entries"] for event in recent) / max(end - begin, 1e-3) * 3600, 1)
