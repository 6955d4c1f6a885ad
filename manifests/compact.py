"""Compaction: the manifests of many shards copied into one file, so that opening a cache reads few files.

Manifests stay the truth and stay where they are. A compacted manifest is derived, immutable, and holds the rows of
some committed shards of one plan; several may repeat a shard, which readers count once. When those of a plan cover
all its shards, readers skip the plan's names in listings too. Whoever sets a manifest aside (`manifests.repair`)
removes the compacted ones of its plan before and after, and a compaction looks again whether all it covers is still
there, so that whichever comes last leaves none that promises what is gone.
"""

from __future__ import annotations

from collections.abc import Iterator

from manifests.cache import Cache
from manifests.keys import FORMAT_VERSION, digest
from manifests.plan import TAG_DIGITS, plan_tag, read_plan
from manifests.schema import KINDS, SAMPLE_KINDS, Kind, compacted_path
from manifests.tables import table_bytes

MIN_SHARDS = 64
"""Fewer uncovered shards of a plan than this are quick to read one by one."""

_PART_SHARDS = 20_000


def compact(cache: Cache, *, min_shards: int = MIN_SHARDS) -> dict[Kind, int]:
    """Cover the shards committed since the last time, plan by plan; return how many shards by kind.

    Safe while others read, write and compact. Shards of no plan the cache knows stay as they are.
    """
    done = dict.fromkeys(KINDS, 0)
    plans = {plan_tag(name.removesuffix(".parquet")): name.removesuffix(".parquet") for name in _plan_names(cache)}
    for kind in KINDS:
        written: dict[str, list[str]] = {}
        by_tag: dict[str, list[str]] = {}
        for shard_id in cache.uncompacted(kind).to_pylist():
            by_tag.setdefault(shard_id[:TAG_DIGITS], []).append(shard_id)
        for tag, shard_ids in by_tag.items():
            if tag not in plans or len(shard_ids) < min_shards:
                continue
            plan_shards = len(read_plan(cache, plans[tag]).shard_ids(kind))
            for part in _parts(shard_ids):
                footer = {"format": FORMAT_VERSION, "tag": tag, "plan_shards": plan_shards}
                data = table_bytes(cache.read_manifests(kind, part), footer)
                path = compacted_path(kind, tag, digest(part))
                cache.store.write_if_absent(path, data)
                written[path] = part
                done[kind] += len(part)
        present = set(cache.store.names(f"entries/{kind}")) if written else set()
        for path, part in written.items():
            if not all(f"{shard_id}.parquet" in present for shard_id in part):
                cache.store.delete(path)
    return {kind: count for kind, count in done.items() if count or kind in SAMPLE_KINDS}


def forget(cache: Cache, kind: str, shard_id: str) -> None:
    """Remove the compacted manifests of a shard's plan; the next compaction makes them again."""
    for info in cache.store.list(f"compacted/{kind}"):
        if info.path.rsplit("/", 1)[1].startswith(shard_id[:TAG_DIGITS] + "-"):
            cache.store.delete(info.path)


def _plan_names(cache: Cache) -> list[str]:
    return [name for name in cache.store.names("plans") if name.endswith(".parquet")]


def _parts(shard_ids: list[str]) -> Iterator[list[str]]:
    for begin in range(0, len(shard_ids), _PART_SHARDS):
        yield shard_ids[begin : begin + _PART_SHARDS]
