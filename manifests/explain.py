"""Why an entry is, or is not, in the cache: which field of its key differs from the entry it would have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import Cache
from manifests.image_context import IMAGE
from manifests.schema import KINDS, OK, SNAPSHOT, Kind
from manifests.tables import read_table

Status = Literal["cached", "quarantined", "stale", "missing"]

_KEY_FIELDS = {
    "latents": ("source_hash", "clip_start", "clip_end", "start", "num_frames", "fps", "height", "width"),
    "context": ("caption",),
}
_KEY_FIELDS["hint"] = (*_KEY_FIELDS["latents"], "hint", "parameters")
_COLUMNS = ("key", "source", *_KEY_FIELDS["hint"], "caption", "status", "error", "shard", "shard_id")
_NEAREST = 32


@dataclass(frozen=True)
class Change:
    """A field of a key: what it was in the entry that is there, and what it is in the one that is wanted."""

    field: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Explanation:
    """What became of one wanted entry.

    status: `cached`; `quarantined` with its error; `stale`, there is an entry of the same video or caption but its
    key differs in `changes`; `missing`, there is none. shard: of the entry that was found.
    """

    kind: Kind
    key: str
    what: str
    status: Status
    error: str | None = None
    shard: str | None = None
    changes: tuple[Change, ...] = field(default=())


def explain(
    cache: Cache, wanted: Sequence[Mapping[str, Any]], parts: Mapping[str, Mapping[str, Any]]
) -> list[Explanation]:
    """Explain entries of one video: rows of schema `WANTED`, latents, hints and the contexts of its captions.

    parts: the fingerprint's parts the entries are wanted with, by kind.
    """
    of_kind = {kind: [row for row in wanted if row["kind"] == kind] for kind in KINDS}
    found = []
    for kind, mine in of_kind.items():
        rows = cache.rows(kind, _COLUMNS)
        if kind != "context":
            related = _of_video(rows, mine)
        else:
            related = _of_captions(cache, rows, mine, of_kind["latents"])
        footers: dict[str, Mapping[str, Any]] = {}
        found += [_explain(cache, row, rows, related.to_pylist(), parts[kind], footers) for row in mine]
    return found


def _explain(
    cache: Cache,
    row: Mapping[str, Any],
    rows: pa.Table,
    related: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Any],
    footers: dict[str, Mapping[str, Any]],
) -> Explanation:
    kind: Kind = row["kind"]
    what = f"caption {row['caption']!r}" if kind == "context" else f"frames {row['start']}+{row['num_frames']}"
    if kind == "hint":
        what = IMAGE.replace("_", " ") if row["hint"] == IMAGE else f"{what}, {row['hint']} {row['parameters']}"
    same = rows.filter(pc.equal(rows["key"], row["key"])).to_pylist()
    good = [one for one in same if one["status"] == OK]
    if good:
        return Explanation(kind, row["key"], what, "cached", shard=good[0]["shard"])
    if same:
        return Explanation(kind, row["key"], what, "quarantined", error=same[0]["error"])
    differing = sorted(related, key=lambda one: (len(_row_changes(one, row)), one["key"]))[:_NEAREST]
    best: tuple[Change, ...] | None = None
    shard = None
    for one in differing:
        if one["shard_id"] not in footers:
            footers[one["shard_id"]] = cache.manifest(kind, one["shard_id"])[1].get("fingerprint", {})
        changes = (*_row_changes(one, row), *_part_changes(footers[one["shard_id"]], parts))
        if changes and (best is None or len(changes) < len(best)):
            best, shard = changes, one["shard"]
    if best is None:
        return Explanation(kind, row["key"], what, "missing", error=row["error"])
    return Explanation(kind, row["key"], what, "stale", error=row["error"], shard=shard, changes=best)


def _row_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    fields = _KEY_FIELDS[new["kind"]]
    return tuple(Change(name, old[name], new[name]) for name in fields if old[name] != new[name])


def _part_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    names = sorted({*old, *new})
    return tuple(Change(f"fingerprint.{n}", old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n))


def _of_video(rows: pa.Table, latents: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of the same file, by its place or by its bytes."""
    places, hashes = (pa.array({row[name] for row in latents}, pa.string()) for name in ("source", "source_hash"))
    same_place = pc.is_in(rows["source"], value_set=places)
    return rows.filter(pc.or_(same_place, pc.is_in(rows["source_hash"], value_set=hashes)))


def _of_captions(
    cache: Cache, rows: pa.Table, contexts: Sequence[Mapping[str, Any]], latents: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """Rows of the same captions, and of the captions the video had in any snapshot."""
    keys: set[str] = set()
    for info in cache.store.list("snapshots"):
        if info.path.endswith(".parquet"):
            columns = ["source", "source_hash", "context_key"]
            table, _ = read_table(cache.store.read(info.path), SNAPSHOT, f"{cache.url}/{info.path}", columns)
            keys.update(_of_video(table, latents)["context_key"].to_pylist())
    captions = pa.array({row["caption"] for row in contexts}, pa.string())
    earlier = pc.is_in(rows["key"], value_set=pa.array(keys, pa.string()))
    return rows.filter(pc.or_(pc.is_in(rows["caption"], value_set=captions), earlier))
