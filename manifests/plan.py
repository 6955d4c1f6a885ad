"""Plans: which entries are missing, cut into shard tasks with deterministic names.

A plan is immutable and put if absent under the name of its job, so drivers of one job share one plan. Tasks are
assigned by a hash of the shard's id, so any subset of a job array can be resubmitted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import Cache, is_first, without_keys
from manifests.errors import UsageError
from manifests.keys import KEY_DIGITS, digest, table_digest
from manifests.schema import KINDS, OK, PLAN, TASK_KINDS, Kind, plan_path
from manifests.tables import read_table, table_bytes

TAG_DIGITS = 12
_PIECE = 65_536
assert TAG_DIGITS + 8 <= KEY_DIGITS


@dataclass(frozen=True)
class ShardTask:
    """Some missing entries of one kind that will become one shard. rows: the plan's rows, in order."""

    shard_id: str
    kind: Kind
    rows: tuple[dict[str, Any], ...] = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """The missing entries of a job. footer: what the manifests will record of the producer."""

    plan_id: str
    table: pa.Table
    footer: dict[str, Any]

    @property
    def num_entries(self) -> int:
        return len(self.table)

    def shard_ids(self, kind: str) -> list[str]:
        rows = self.table.filter(pc.equal(self.table["kind"], kind))
        return pc.unique(rows["shard_id"]).to_pylist()

    def tasks(self, *, index: int = 0, total: int = 1) -> Iterator[ShardTask]:
        """Yield the tasks of worker `index` of `total`, contexts first (they are few and quick), hints last."""
        for kind in TASK_KINDS:
            rows = self.table.filter(pc.equal(self.table["kind"], kind)).combine_chunks()
            begins = np.flatnonzero(is_first(rows["shard_id"].combine_chunks()))
            for begin, end in itertools.pairwise([*begins, len(rows)]):
                shard_id = rows["shard_id"][begin].as_py()
                if task_of(shard_id, total) == index:
                    yield ShardTask(shard_id, kind, tuple(rows.slice(begin, end - begin).to_pylist()))


def task_of(shard_id: str, total: int) -> int:
    """Which of `total` workers a shard belongs to: known from its name alone, so any subset can be run again."""
    return int(shard_id[-8:], 16) % total


def plan_tag(plan_id: str) -> str:
    """Return what the names of a plan's shards begin with, so that they lie side by side in a listing."""
    return digest(plan_id)[:TAG_DIGITS]


def missing_entries(cache: Cache | None, wanted: pa.Table, *, retry_quarantined: bool = False) -> pa.Table:
    """Return the rows of `wanted` (schema `WANTED`) that the cache has no entry of; None is an empty cache.

    A quarantined entry counts as present unless `retry_quarantined`: its bytes will fail again.
    """
    if cache is None:
        return wanted
    known = []
    for kind in KINDS:
        index = cache.index(kind, ["key", "status"])
        if retry_quarantined:
            index = index.filter(pc.equal(index["status"], OK))
        known += index["key"].chunks
    return without_keys(wanted, pa.chunked_array(known, pa.string()))


def make_plan(plan_id: str, missing: pa.Table, entries_per_shard: Mapping[str, int], footer: Mapping[str, Any]) -> Plan:
    """Cut missing entries into shards, windows of one source side by side."""
    tag = plan_tag(plan_id)
    order = [(name, "ascending") for name in ("kind", "source_hash", "start", "key")]
    rows = missing.take(pc.sort_indices(missing.select([name for name, _ in order]), order))
    ids: list[str] = []
    for kind in sorted(entries_per_shard):
        keys = rows["key"].slice(len(ids), pc.sum(pc.equal(rows["kind"], kind)).as_py() or 0).combine_chunks()
        size = entries_per_shard[kind]
        for begin in range(0, len(keys), size):
            chunk = keys.slice(begin, size).to_pylist()
            ids += [tag + digest([kind, plan_id, chunk])[TAG_DIGITS:]] * len(chunk)
    return Plan(plan_id, rows.append_column("shard_id", pa.array(ids, pa.string())).select(PLAN.names), dict(footer))


def adopt_plan(
    cache: Cache,
    wanted: pa.Table,
    missing: pa.Table,
    entries_per_shard: Mapping[str, int],
    footer: Mapping[str, Any],
) -> Plan:
    """Agree with every other driver of the same job on one plan, and return what of it is still to do.

    A job is named by the keys it wants. Its first plan is put if absent, so drivers that start together, or a
    driver that starts again after a kill, find the same shards. Only when entries are missing that no pending shard
    of the plan holds (a repair, a retry of quarantined videos) is a further plan made.
    """
    job_id = column_digest(wanted["key"].sort())
    committed = pa.concat_arrays([cache.shard_ids(kind) for kind in KINDS])
    for number in itertools.count():
        plan_id = f"{job_id}-{number}"
        if not cache.store.exists(plan_path(plan_id)):
            plan = make_plan(plan_id, missing, entries_per_shard, footer)
            if cache.store.write_if_absent(plan_path(plan_id), table_bytes(plan.table, plan.footer)):
                return plan
        plan = read_plan(cache, plan_id)
        pending = plan.table.filter(pc.invert(pc.is_in(plan.table["shard_id"], value_set=committed)))
        if not len(without_keys(missing, pending["key"])):
            return Plan(plan_id, _with_work_left(pending, missing), plan.footer)
    raise AssertionError("unreachable")


def _with_work_left(pending: pa.Table, missing: pa.Table) -> pa.Table:
    """The rows of shards that hold a missing entry: another job may have committed all of a shard's in its own."""
    shards = pending.filter(pc.is_in(pending["key"], value_set=missing["key"]))["shard_id"]
    return pending.filter(pc.is_in(pending["shard_id"], value_set=shards))


def column_digest(values: pa.ChunkedArray | pa.Array) -> str:
    """Hash a column without holding its values as Python objects."""
    pieces = (values.slice(begin, _PIECE).to_pylist() for begin in range(0, len(values), _PIECE))
    return table_digest("column", [pieces])


def read_plan(cache: Cache, plan_id: str) -> Plan:
    """Read a plan; `UsageError` if the cache has none of that id."""
    path = plan_path(plan_id)
    try:
        data = cache.store.read(path)
    except FileNotFoundError:
        raise UsageError(f"cache {cache.url!r} has no plan {plan_id!r}; run `latentline encode` again") from None
    table, footer = read_table(data, PLAN, f"{cache.url}/{path}")
    return Plan(plan_id, table, footer)
