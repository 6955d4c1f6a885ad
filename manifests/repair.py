"""Repair: damaged shards set aside, so that the next encode plans their entries again.

Nothing is deleted but what can be made again from manifests: a manifest that is set aside lies under `damaged/`
with the reasons beside it, and its tar stays where it is until `cache gc`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.cache import Cache
from manifests.compact import forget
from manifests.errors import CorruptError
from manifests.keys import checksum
from manifests.schema import Kind, damaged_path, manifest_path
from manifests.snapshot import relocate

if TYPE_CHECKING:
    from manifests.verify import Finding


@dataclass(frozen=True)
class Repaired:
    """What a repair did. set_aside: paths under `damaged/`. mended: snapshots that point at whole entries again."""

    set_aside: tuple[str, ...]
    mended: tuple[str, ...]
    left: tuple[Finding, ...]


def repair(cache: Cache, findings: Sequence[Finding]) -> Repaired:
    """Set damaged shards aside, drop damaged copies, and mend the snapshots that can be.

    left: damage that only another encode, or a person, can mend.
    """
    reasons: dict[tuple[Kind, str], list[str]] = {}
    for finding in findings:
        if finding.damage and finding.kind is not None and finding.shard_id is not None:
            reasons.setdefault((finding.kind, finding.shard_id), []).append(f"{finding.where}: {finding.what}")
    set_aside = [_set_aside(cache, kind, shard_id, why) for (kind, shard_id), why in reasons.items()]
    left = []
    for finding in findings:
        if finding.where.startswith("compacted/"):
            cache.store.delete(finding.where)
        elif finding.damage and finding.shard_id is None:
            left.append(finding)
    mended = mend_snapshots(cache)
    left = [finding for finding in left if finding.where not in mended]
    return Repaired(tuple(path for path in set_aside if path), tuple(mended), tuple(left))


def mend_snapshots(cache: Cache) -> list[str]:
    """Point every snapshot at where its entries lie now; return the paths of those that had to be.

    One that is unreadable, or has an entry the cache lacks, is left as it is.
    """
    mended = []
    for name in sorted(cache.store.names("snapshots")):
        if name.endswith(".parquet"):
            try:
                moved = relocate(cache, name.removesuffix(".parquet"))
            except CorruptError:
                continue
            if moved:
                mended.append(f"snapshots/{name}")
    return mended


def _set_aside(cache: Cache, kind: Kind, shard_id: str, reasons: Sequence[str]) -> str | None:
    """Move a manifest under `damaged/`. Killed anywhere, it is still in force, or set aside and not promised."""
    path = manifest_path(kind, shard_id)
    try:
        data = cache.store.read(path)
    except FileNotFoundError:
        return None
    target = damaged_path(kind, shard_id, checksum(data)[:12])
    cache.store.write(target, data)
    cache.store.write(target.removesuffix(".parquet") + ".json", json.dumps(list(reasons), indent=1).encode())
    forget(cache, kind, shard_id)
    cache.store.delete(path)
    forget(cache, kind, shard_id)
    return target
