"""Committing a shard: at-least-once work, exactly-once visibility, no lock and no coordinator.

A worker writes the tar under a name no other attempt has, reads it back and checks every payload, then puts
the manifest *if absent*. The manifest's appearance is the commit; whoever loses the race deletes its own tar.
A worker killed anywhere leaves at most a tar that no manifest names.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from manifests.errors import CorruptError
from manifests.keys import FORMAT_VERSION, checksum
from manifests.schema import MANIFEST, OK, QUARANTINED, manifest_path, tar_path
from manifests.shards import Entry, pack
from manifests.store import Store
from manifests.tables import table_bytes


def commit_shard(
    store: Store,
    *,
    kind: str,
    shard_id: str,
    inputs: Sequence[Mapping[str, Any]],
    entries: Mapping[str, Entry],
    errors: Mapping[str, str],
    footer: Mapping[str, Any],
) -> bool:
    """Write one shard and commit it; return whether this call's commit won.

    inputs: the plan's rows of this shard, in order. entries: what was encoded, by key. errors: why the other
    keys could not be, by key; those rows are quarantined. A key in neither raises `ValueError`.
    footer: of the manifest; the size and checksum of the tar are added to it.
    """
    lost = [row["key"] for row in inputs if row["key"] not in entries and row["key"] not in errors]
    if lost:
        raise ValueError(f"shard {shard_id}: neither an entry nor an error for {lost[:3]}")
    data, members = pack(entries[row["key"]] for row in inputs if row["key"] in entries)
    path = tar_path(kind, shard_id, uuid.uuid4().hex[:12])
    if members:
        store.write(path, data)
        _check(store, path, len(data), members)
    placed = {member.key: member for member in members}
    rows = []
    for row in inputs:
        member = placed.get(row["key"])
        known = {name: row.get(name) for name in MANIFEST.names}
        if member is None:
            rows.append(known | {"status": QUARANTINED, "error": errors[row["key"]]})
        else:
            rows.append(
                known
                | {
                    "status": OK,
                    "error": None,
                    "shard": path,
                    "offset": member.offset,
                    "size": member.size,
                    "checksum": member.checksum,
                    "shape": list(member.shape),
                    "dtype": member.dtype,
                }
            )
    table = pa.Table.from_pylist(rows, schema=MANIFEST)
    tar = {"tar": {"size": len(data), "checksum": checksum(data)}} if members else {}
    manifest = table_bytes(table, {"format": FORMAT_VERSION, **footer, **tar})
    target = manifest_path(kind, shard_id)
    # A put whose answer was lost is tried again by the store and meets itself; the tar's name tells whose it is.
    won = store.write_if_absent(target, manifest) or store.read(target) == manifest
    if not won and members:
        store.delete(path)
    return won


def _check(store: Store, path: str, size: int, members: Sequence[Any]) -> None:
    data = store.read(path)
    if len(data) != size:
        raise CorruptError(f"{store.url}/{path}: wrote {size} bytes, read back {len(data)}")
    view = memoryview(data)
    for member in members:
        if checksum(view[member.offset : member.offset + member.size]) != member.checksum:
            raise CorruptError(f"{store.url}/{path}: {member.key} read back differs from what was written")
