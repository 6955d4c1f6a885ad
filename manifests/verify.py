"""Verify: every promise of a cache checked against its bytes.

Reads each shard once, and holds a piece of it at a time. What is found is damage, which `manifests.repair` can set
aside, or a note: something that costs space and harms nobody.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from manifests.cache import Cache
from manifests.errors import CorruptError, LatentlineError
from manifests.keys import context_key, fingerprint, hint_key, latents_key
from manifests.payloads import shard_faults
from manifests.sample_rows import flat_hints
from manifests.schema import (
    COMPACTED,
    KINDS,
    OK,
    QUARANTINED,
    SAMPLE_KINDS,
    SNAPSHOT,
    Kind,
    manifest_path,
    snapshot_path,
)
from manifests.snapshot import hash_rows
from manifests.tables import read_table

Track = Callable[[Iterable[Any], int], Iterable[Any]]

READERS = 4
"""Shards read at a time."""

ENCODE = "run `latentline cache verify --repair`, then `latentline encode`"
REPAIR = "run `latentline cache verify --repair`"


@dataclass(frozen=True)
class Finding:
    """Something that is not as promised.

    where: path in the cache, with a key where one entry is meant. damage: False for a note.
    kind, shard_id: of the shard to set aside, if that is what mends it.
    """

    where: str
    what: str
    todo: str
    damage: bool = True
    kind: Kind | None = None
    shard_id: str | None = None


@dataclass(frozen=True)
class Verified:
    """What was read, and what was found: damage first. bytes: of shards and manifests."""

    shards: int
    entries: int
    bytes: int
    snapshots: int
    findings: tuple[Finding, ...]

    @property
    def damaged(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.damage)


@dataclass(frozen=True)
class _Shard:
    """What checking one shard gave. good: (tar, offset, checksum) of each entry that is as promised, by key."""

    kind: Kind
    shard_id: str
    tar: str | None
    bytes: int
    digest: str
    good: dict[str, tuple[str, int, str]]
    findings: list[Finding]


def verify(cache: Cache, *, track: Track = lambda items, total: items) -> Verified:
    """Check everything in a cache. track: wraps the loop over shards, for progress."""
    findings: list[Finding] = []
    good: set[tuple[str, int, str]] = set()
    shards, entries, size = 0, 0, 0
    for kind in KINDS:
        names = sorted(cache.store.names(f"entries/{kind}"))
        if not names and kind not in SAMPLE_KINDS:
            continue
        ids = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
        digests: dict[str, str] = {}
        owners: dict[str, str] = {}
        named: set[str] = set()
        with ThreadPoolExecutor(READERS) as readers:
            checked = readers.map(functools.partial(_check_shard, cache, kind), ids)
            for shard in track(checked, len(ids)):
                findings += shard.findings
                shards, entries, size = shards + 1, entries + len(shard.good), size + shard.bytes
                digests[shard.shard_id] = shard.digest
                named.add(shard.tar or "")
                good.update(shard.good.values())
                for key in shard.good:
                    if key in owners:
                        findings.append(_repeated(kind, key, owners[key], shard.shard_id))
                    owners.setdefault(key, shard.shard_id)
        findings += _orphans(kind, names, named)
        findings += _check_compacted(cache, kind, digests)
    snapshots = _snapshot_hashes(cache)
    for name in snapshots:
        findings += _check_snapshot(cache, name, good)
    findings += _check_names(cache, set(snapshots))
    findings.sort(key=lambda finding: not finding.damage)
    return Verified(shards, entries, size, len(snapshots), tuple(findings))


def _check_shard(cache: Cache, kind: Kind, shard_id: str) -> _Shard:
    path = manifest_path(kind, shard_id)
    found: list[Finding] = []

    def bad(what: str, where: str = path) -> None:
        found.append(Finding(where, what, ENCODE, kind=kind, shard_id=shard_id))

    try:
        table, footer = cache.manifest(kind, shard_id)
    except CorruptError as error:
        bad(str(error).removeprefix(f"{cache.url}/{path}: "))
        return _Shard(kind, shard_id, None, 0, "", {}, found)
    rows = table.to_pylist()
    for what in _row_faults(rows, kind, footer):
        bad(what)
    promised = [row for row in rows if row["status"] == OK]
    tars = sorted({row["shard"] or "" for row in promised})
    if not tars:
        return _Shard(kind, shard_id, None, 0, rows_digest(table), {}, found)
    tar = tars[0]
    if len(tars) > 1 or not tar.startswith(f"entries/{kind}/{shard_id}."):
        bad(f"names the tars {', '.join(tars)}; a shard has one, of its own name")
        return _Shard(kind, shard_id, tar, 0, rows_digest(table), {}, found)
    try:
        size = cache.store.size(tar)
        faults, tar_faults = shard_faults(cache.store.pieces(tar), size, promised, footer.get("tar"))
    except FileNotFoundError:
        bad("missing, but its manifest names it", tar)
        return _Shard(kind, shard_id, tar, 0, rows_digest(table), {}, found)
    good = {}
    for row, found_here in zip(promised, faults, strict=True):
        for what in found_here:
            bad(what, f"{tar} {row['key']}")
        if not found_here:
            good[row["key"]] = (tar, row["offset"], row["checksum"])
    for what in tar_faults:
        bad(what, tar)
    return _Shard(kind, shard_id, tar, size, rows_digest(table), good, found)


def _row_faults(rows: Sequence[dict[str, Any]], kind: Kind, footer: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest by itself: rows it should not have, keys that are not what they should be."""
    faults = []
    keys = [row["key"] for row in rows]
    if not rows:
        faults.append("has no rows")
    if len(set(keys)) < len(keys):
        faults.append(f"{len(keys) - len(set(keys))} keys are repeated")
    if any(row["kind"] != kind or row["status"] not in (OK, QUARANTINED) for row in rows):
        faults.append("rows of another kind or of an unknown status")
    if "fingerprint" not in footer:
        return faults
    producer = fingerprint(footer["fingerprint"])
    foreign = [row["key"] for row in rows if key_of(row, producer) != row["key"]]
    if foreign:
        faults.append(f"{len(foreign)} keys do not follow from their rows and its fingerprint (first: {foreign[0]})")
    return faults


def key_of(row: dict[str, Any], producer: str) -> str:
    """Compute the key of a manifest's row from its fields and its producer's fingerprint."""
    if row["kind"] == "context":
        return context_key(caption=row["caption"], fingerprint=producer)
    clip = None if row["clip_start"] is None else (row["clip_start"], row["clip_end"])
    window = {name: row[name] for name in ("source_hash", "start", "num_frames", "fps", "height", "width")}
    if row["kind"] == "hint":
        return hint_key(hint=row["hint"], parameters=row["parameters"], **window, clip=clip, fingerprint=producer)
    return latents_key(**window, clip=clip, fingerprint=producer)


def rows_digest(table: pa.Table) -> str:
    """Hash what rows promise, to compare a manifest with its compacted copy."""
    columns = ("key", "status", "shard", "offset", "size", "checksum")
    return hashlib.sha256(json.dumps([table[name].to_pylist() for name in columns]).encode()).hexdigest()


def _repeated(kind: Kind, key: str, first: str, second: str) -> Finding:
    what = f"the entry is also in shard {first}; readers use the first"
    return Finding(f"{manifest_path(kind, second)} {key}", what, "nothing: it only takes space", damage=False)


def _orphans(kind: Kind, names: Sequence[str], named: set[str]) -> list[Finding]:
    todo = "`latentline cache gc` removes it once it is old enough"
    return [
        Finding(f"entries/{kind}/{name}", "no manifest names it: an abandoned attempt", todo, damage=False)
        for name in names
        if not name.endswith(".parquet") and f"entries/{kind}/{name}" not in named
    ]


def _check_compacted(cache: Cache, kind: Kind, digests: dict[str, str]) -> list[Finding]:
    found = []
    for info in cache.store.list(f"compacted/{kind}"):
        try:
            table, _ = read_table(cache.store.read(info.path), COMPACTED, f"{cache.url}/{info.path}")
        except CorruptError as error:
            found.append(Finding(info.path, str(error).removeprefix(f"{cache.url}/{info.path}: "), REPAIR))
            continue
        ids = table["shard_id"].to_pylist()
        begins = [row for row, shard_id in enumerate(ids) if row == 0 or ids[row - 1] != shard_id]
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            if digests.get(ids[begin]) != rows_digest(table.slice(begin, end - begin)):
                what = f"differs from the manifest of shard {ids[begin]}, or that is gone"
                found.append(Finding(info.path, what, REPAIR))
                break
    return found


def _snapshot_hashes(cache: Cache) -> list[str]:
    return sorted(name.removesuffix(".parquet") for name in cache.store.names("snapshots") if name.endswith(".parquet"))


def _check_snapshot(cache: Cache, snapshot_hash: str, good: set[tuple[str, int, str]]) -> list[Finding]:
    path = snapshot_path(snapshot_hash)
    try:
        table, footer = read_table(cache.store.read(path), SNAPSHOT, f"{cache.url}/{path}")
    except CorruptError as error:
        return [Finding(path, str(error).removeprefix(f"{cache.url}/{path}: "), "run `latentline encode` again")]
    if hash_rows(table) != snapshot_hash:
        return [Finding(path, "its rows are not those it is named after", "run `latentline encode` again")]
    gone, first = 0, ""
    for kind in KINDS:
        columns = [_places(table, kind, name).to_pylist() for name in ("shard", "offset", "checksum", "key")]
        for shard, offset, payload_checksum, key in zip(*columns, strict=True):
            if (shard, offset, payload_checksum) not in good:
                gone, first = gone + 1, first or f"{kind} {key} in {shard}"
    for location in (footer["null_context"], *footer["negative_contexts"].values()):
        if (location["shard"], location["offset"], location["checksum"]) not in good:
            gone, first = gone + 1, first or f"a context in {location['shard']}"
    if not gone:
        return []
    return [Finding(path, f"{gone} entries are gone, damaged or elsewhere (first: {first})", ENCODE)]


def _places(table: pa.Table, kind: Kind, name: str) -> pa.ChunkedArray:
    return flat_hints(table, f"hint_{name}s") if kind == "hint" else table[f"{kind}_{name}"]


def _check_names(cache: Cache, hashes: set[str]) -> list[Finding]:
    found = []
    for info in cache.store.list("snapshots"):
        if not info.path.endswith(".json"):
            continue
        try:
            target = json.loads(cache.store.read(info.path))["snapshot"]
        except (ValueError, KeyError, TypeError, LatentlineError):
            found.append(Finding(info.path, "unreadable", "run `latentline encode` again"))
            continue
        if target not in hashes:
            found.append(Finding(info.path, f"points at snapshot {target}, which is gone", "run `latentline encode`"))
    return found
