"""Garbage: what no manifest and no snapshot names, and nobody will miss.

Workers of a running job have tars no manifest names yet, so only what is older than an age is garbage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import Cache
from manifests.compact import MIN_SHARDS
from manifests.plan import read_plan
from manifests.sample_rows import flat_hints
from manifests.schema import KINDS, SAMPLE_KINDS, SNAPSHOT
from manifests.store import ObjectInfo
from manifests.tables import read_table

ABANDONED = "abandoned tar"
STAGED = "unfinished write"
SET_ASIDE = "set aside by a repair"
SPENT = "plan with nothing left to do"
PROBE = "left by a check of the store"

_ARRAY = ".array.json"


@dataclass(frozen=True)
class Garbage:
    """One object to remove. size: bytes. age: seconds since it was written. why: one of this module's constants."""

    path: str
    size: int
    age: float
    why: str


def find_garbage(cache: Cache, *, older_than: float) -> list[Garbage]:
    """List what can go and is older than `older_than` seconds, in order of path."""
    now = time.time()
    # Listed before manifests and snapshots are read: what is committed meanwhile is younger than any sensible age.
    found = [*_tars(cache), *_spent_plans(cache), *_staged(cache)]
    found += [(info, SET_ASIDE) for info in cache.store.list("damaged")]
    found += [(info, PROBE) for info in cache.store.list("probe")]
    garbage = [Garbage(info.path, info.size, now - info.modified, why) for info, why in found]
    return sorted((item for item in garbage if item.age > older_than), key=lambda item: item.path)


def remove(cache: Cache, garbage: Sequence[Garbage]) -> None:
    """Delete what `find_garbage` listed."""
    for item in garbage:
        if item.why == STAGED and cache.store.root is not None:
            (cache.store.root / item.path).unlink(missing_ok=True)
        else:
            cache.store.delete(item.path)


def _tars(cache: Cache) -> Iterator[tuple[ObjectInfo, str]]:
    tars = {
        info.path: info for kind in KINDS for info in cache.store.list(f"entries/{kind}") if info.path[-4:] == ".tar"
    }
    named = {path for kind in KINDS for path in pc.unique(cache.rows(kind, ["shard"])["shard"]).to_pylist()}
    for info in cache.store.list("snapshots"):
        if info.path.endswith(".parquet"):
            table, footer = read_table(cache.store.read(info.path), SNAPSHOT, f"{cache.url}/{info.path}")
            named.update(*(pc.unique(table[f"{kind}_shard"]).to_pylist() for kind in SAMPLE_KINDS))
            named.update(pc.unique(flat_hints(table, "hint_shards")).to_pylist())
            named.update(place["shard"] for place in (footer["null_context"], *footer["negative_contexts"].values()))
    yield from ((info, ABANDONED) for path, info in tars.items() if path not in named)


def _spent_plans(cache: Cache) -> Iterator[tuple[ObjectInfo, str]]:
    """Plans all of whose entries are committed, except those compaction still needs, and array sizes without a plan."""
    found = cache.store.list("plans")
    plans = [info for info in found if info.path.endswith(".parquet")]
    needed = {info.path for info in plans}
    if plans:
        spent = list(_spent(cache, plans))
        needed -= {info.path for info in spent}
        yield from ((info, SPENT) for info in spent)
    jobs = {path.rpartition("-")[0] for path in needed}
    arrays = {info.path.removesuffix(_ARRAY): info for info in found if info.path.endswith(_ARRAY)}
    yield from ((info, SPENT) for job, info in arrays.items() if job not in jobs)


def _spent(cache: Cache, plans: Sequence[ObjectInfo]) -> Iterator[ObjectInfo]:
    keys = pa.chunked_array(
        [chunk for kind in KINDS for chunk in cache.index(kind, ["key"])["key"].chunks], pa.string()
    )
    waiting = pa.concat_arrays([cache.uncompacted(kind) for kind in KINDS])
    for info in plans:
        plan = read_plan(cache, info.path.removeprefix("plans/").removesuffix(".parquet"))
        done = pc.all(pc.is_in(plan.table["key"], value_set=keys)).as_py()
        shard_ids = pc.unique(plan.table["shard_id"])
        uncompacted = pc.sum(pc.is_in(shard_ids, value_set=waiting)).as_py() or 0
        if done and uncompacted < MIN_SHARDS:
            yield info


def _staged(cache: Cache) -> Iterator[tuple[ObjectInfo, str]]:
    """Files a killed writer left half-written; a local store hides them by their names."""
    if cache.store.root is None:
        return
    for folder, _, names in os.walk(cache.store.root):
        for name in names:
            if "#" in name:
                path = os.path.join(folder, name)
                stat = os.stat(path)
                relative = os.path.relpath(path, cache.store.root)
                yield ObjectInfo(relative, stat.st_size, stat.st_mtime), STAGED
