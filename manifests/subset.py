"""New snapshots out of one: the samples a condition holds for, split into parts by source video.

A part depends on a video's bytes alone, so windows of one video never straddle parts, and a video keeps its part when
others are added or the condition changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from manifests.cache import Cache
from manifests.errors import UsageError
from manifests.filters import matching
from manifests.schema import SNAPSHOT, snapshot_path
from manifests.snapshot import Snapshot, check_name, load_snapshot, write_snapshot
from manifests.tables import read_table


@dataclass(frozen=True)
class Subset:
    """A snapshot that was written. videos: distinct sources of its samples."""

    name: str
    hash: str
    samples: int
    videos: int


def make_subsets(
    cache: Cache, base: str, name: str, *, where: str | None = None, split: Mapping[str, float] | None = None
) -> list[Subset]:
    """Write the snapshot `name` with the samples of snapshot `base` that `where` holds for.

    split: shares of the videos, between 0 and 1, by part; each goes to a snapshot `<name>-<part>`, the rest to `name`.
    Raises `UsageError` for a condition or share that makes no sense, or a part that would be empty, before anything
    is written.
    """
    shares = dict(split or {})
    for part, share in shares.items():
        check_name(f"{name}-{part}")
        if not 0 < share < 1:
            raise UsageError(f"--split {part}={share:g}: a share is between 0 and 1")
    if sum(shares.values()) >= 1:
        raise UsageError(f"--split: the shares sum to {sum(shares.values()):g}; leave some for {name!r} itself")
    check_name(name)
    source = load_snapshot(cache.store, base)
    path = snapshot_path(source.hash)
    table, footer = read_table(cache.store.read(path), SNAPSHOT, f"{cache.url}/{path}")
    chosen = matching(table, where) if where else table
    places = _places(chosen["source_hash"])
    written = {}
    begin = 0.0
    for part, share in shares.items():
        written[f"{name}-{part}"] = chosen.filter(pa.array((places >= begin) & (places < begin + share)))
        begin += share
    written[name] = chosen.filter(pa.array(places >= begin))
    empty = [part for part, rows in written.items() if not len(rows)]
    if empty:
        videos = len(chosen["source_hash"].unique())
        raise UsageError(
            f"snapshot {empty[0]!r} would be empty: {len(chosen)} of {len(table)} samples match, of {videos} videos"
        )
    return [
        Subset(
            part,
            write_snapshot(cache.store, rows, footer, part),
            samples=len(rows["sample_id"].unique()),
            videos=len(rows["source_hash"].unique()),
        )
        for part, rows in written.items()
    ]


def hold_out(snapshot: Snapshot, share: float) -> tuple[Snapshot, Snapshot]:
    """Split a snapshot in memory: (the rest, the samples of a `share` of the videos).

    The same videos as in the first part of `make_subsets` with that share. Raises `UsageError` if one would be empty.
    """
    places = _places(snapshot.column("source_hash"))
    held = places < share
    if held.all() or not held.any():
        videos = len(np.unique(places))
        change = (
            f"give more than {places.min():.4f} and at most {places.max():.4f}" if videos > 1 else "there is but one"
        )
        raise UsageError(
            f"a share of {share:g} is all or none of the {videos} videos of snapshot {snapshot.hash[:12]}, by their "
            f"hashes; {change}"
        )
    return snapshot.part(~held), snapshot.part(held)


def _places(source_hashes: pa.ChunkedArray) -> np.ndarray:
    """Give each row its video's fixed place in [0, 1)."""
    encoded = source_hashes.combine_chunks().dictionary_encode()
    of_video = [
        int.from_bytes(hashlib.sha256(f"split/{value}".encode()).digest()[:7], "big") / 2**56
        for value in encoded.dictionary.to_pylist()
    ]
    return np.asarray(of_video, dtype=np.float64)[encoded.indices.to_numpy(zero_copy_only=False)]
