"""Snapshots: a frozen, sorted list of samples, named by a hash of what they are made of.

A run trains on exactly one snapshot. Its hash covers which samples it holds, in order, and not where their
entries lie, so the same data encoded twice, anywhere, is the same snapshot and trains in the same order.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import Cache, is_first
from manifests.errors import LatentlineError, UsageError
from manifests.hints import kind_of
from manifests.keys import FORMAT_VERSION, table_digest
from manifests.places import HINT_PLACES, REPEATED, HintPlaces, Location, Places, compact, plain
from manifests.sample_rows import first_names, is_new, pieces, sample_ids
from manifests.schema import OK, SAMPLE_KINDS, SNAPSHOT, SNAPSHOT_IDENTITY, snapshot_name_path, snapshot_path
from manifests.store import Store
from manifests.tables import read_table, table_bytes

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Sample:
    """What one training step consumes: latents, and one of the contexts.

    contexts, captions: of each caption, by name, in order of the names; a single one without a name is under "".
    latents_shape: (C, T, H, W) in latent frames and latent pixels. hints: by name, `<kind>/<variant>`, and the image
    context.
    padding: pixels of the frames that are not the video's (top, bottom, left, right); None where there are none.
    """

    sample_id: str
    latents: Location
    contexts: dict[str, Location]
    latents_shape: tuple[int, ...]
    dataset: str
    source: str
    captions: dict[str, str]
    hints: dict[str, Location] = field(default_factory=dict)
    padding: tuple[int, int, int, int] | None = None


class Snapshot:
    """A snapshot in memory.

    table: a row a sample and caption (schema `SNAPSHOT`), those of a sample side by side.
    fingerprints: the producers' parts, by kind. null_context: the context of dropped text.
    negative_contexts: contexts of negative prompts, by prompt.
    """

    def __init__(self, snapshot_hash: str, table: pa.Table, footer: Mapping[str, Any]) -> None:
        self.hash = snapshot_hash
        self.table = table
        self._footer = footer
        self.fingerprints: dict[str, dict[str, Any]] = footer["fingerprints"]
        self.null_context = Location(**footer["null_context"])
        self.negative_contexts = {
            prompt: Location(**location) for prompt, location in footer["negative_contexts"].items()
        }

        self.first_rows = np.flatnonzero(is_first(plain(table["sample_id"])))

    @property
    def num_samples(self) -> int:
        return len(self.first_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column with one value a sample: of its first caption, where its captions differ."""
        return self.table[name].take(pa.array(self.first_rows))

    @property
    def shapes(self) -> dict[tuple[int, ...], int]:
        """Samples in each bucket, by latent shape (C, T, H, W)."""
        counts: dict[tuple[int, ...], int] = {}
        for shape in self.column("latents_shape").to_pylist():
            counts[tuple(shape)] = counts.get(tuple(shape), 0) + 1
        return counts

    def part(self, samples: npt.ArrayLike) -> Snapshot:
        """Return the snapshot of some of the samples, in the same order; nothing is written.

        samples: their indices, or a mask over all.
        """
        chosen: npt.NDArray[np.bool_] = np.zeros(self.num_samples, dtype=bool)
        chosen[samples] = True
        captions = np.diff(self.first_rows, append=len(self.table))
        table = self.table.filter(pa.array(np.repeat(chosen, captions)))
        return Snapshot(hash_rows(table), table, self._footer)

    def sample(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        begin = int(self.first_rows[index])
        end = int(self.first_rows[index + 1]) if index + 1 < self.num_samples else len(self.table)
        rows = self.table.slice(begin, end - begin).to_pylist()
        first = rows[0]
        return Sample(
            sample_id=first["sample_id"],
            latents=_location(first, "latents_"),
            contexts={row["caption_name"] or "": _location(row, "context_") for row in rows},
            latents_shape=tuple(first["latents_shape"]),
            dataset=first["dataset"],
            source=first["source"],
            captions={row["caption_name"] or "": row["caption"] for row in rows},
            hints=_hint_locations(first),
            padding=tuple(first["padding"]) if first["padding"] else None,
        )

    @property
    def hint_kinds(self) -> dict[str, int]:
        """Samples that have hints of each kind."""
        kinds: dict[str, int] = {}
        for names in self.column("hint_names").to_pylist():
            for kind in {kind_of(name) for name in names or ()}:
                kinds[kind] = kinds.get(kind, 0) + 1
        return kinds


@dataclass(frozen=True)
class SnapshotCounts:
    """samples: kept. quarantined: left out because a window or caption is. duplicates: equal samples merged."""

    samples: int
    quarantined: int
    duplicates: int


def build_snapshot(
    cache: Cache,
    samples: pa.Table,
    *,
    name: str,
    fingerprints: Mapping[str, Mapping[str, Any]],
    null_key: str,
    negative_keys: Mapping[str, str],
) -> tuple[Snapshot, SnapshotCounts]:
    """Freeze samples whose entries are committed, and point `name` at the result.

    samples: one row a window and caption, with the columns of `SNAPSHOT` up to `weight` except `sample_id`, and
    `hints_key`, `padding`, `hint_names` and `hint_keys` where there are hints.
    Raises `LatentlineError` if an entry is neither committed nor quarantined, or if no sample is left.
    """
    check_name(name)
    for column in ("hints_key", "padding", "hint_names", "hint_keys"):
        if column not in samples.column_names:
            samples = samples.append_column(SNAPSHOT.field(column), pa.nulls(len(samples), SNAPSHOT.field(column).type))
    places = {kind: Places(cache, kind, samples[f"{kind}_key"]) for kind in SAMPLE_KINDS}
    hints = HintPlaces(cache, samples)
    statuses = [places[kind].column("status") for kind in SAMPLE_KINDS] + [hints.status]
    unknown = functools.reduce(pc.or_, map(pc.is_null, statuses))
    missing = pc.sum(unknown).as_py() or 0
    if missing:
        source = samples["source"][pc.index(unknown, True).as_py()].as_py()
        raise LatentlineError(
            f"cache {cache.url!r}: {missing} of {len(samples)} samples are not encoded yet (first: {source}); "
            "run `latentline encode` again"
        )
    ids = sample_ids(samples)
    bad = ids.filter(pc.invert(functools.reduce(pc.and_, (pc.equal(status, OK) for status in statuses))))
    good = pc.invert(pc.is_in(ids, value_set=bad))  # a sample with a caption in quarantine is left out whole
    windows = pc.equal(samples["caption_name"].fill_null(""), first_names(samples))
    num_windows, num_good = pc.sum(windows).as_py(), pc.sum(pc.and_(windows, good)).as_py() or 0
    if not num_good:
        raise LatentlineError(f"cache {cache.url!r}: every one of the {num_windows} samples is quarantined")
    footer = {
        "format": FORMAT_VERSION,
        "fingerprints": {kind: dict(parts) for kind, parts in fingerprints.items()},
        "null_key": null_key,
        "negative_keys": dict(negative_keys),
        **_fixed_contexts(cache, places["context"].index, null_key, negative_keys),
    }
    by = ["id", "caption_name", "source"]
    order = pc.sort_indices(
        pa.table([ids, samples["caption_name"], samples["source"]], by), [(name, "ascending") for name in by]
    )
    order = order.filter(good.take(order))
    order = order.filter(is_new(ids.take(order), samples["caption_name"].take(order)))
    columns = {"sample_id": ids.take(order)}
    columns |= {
        name: compact(samples[name], name).take(order) for name in SNAPSHOT.names if name in samples.column_names
    }
    for kind in SAMPLE_KINDS:
        columns |= places.pop(kind).columns(order)
    columns |= {name: column.take(order) for name, column in hints.columns.items()}
    table = pa.table([columns[name] for name in SNAPSHOT.names], SNAPSHOT.names).combine_chunks()
    snapshot_hash = write_snapshot(cache.store, table, footer, name)
    snapshot = Snapshot(snapshot_hash, table, footer)
    counts = SnapshotCounts(snapshot.num_samples, num_windows - num_good, num_good - snapshot.num_samples)
    return snapshot, counts


def _hint_locations(row: Mapping[str, Any]) -> dict[str, Location]:
    columns = (row[name] or () for name in ("hint_names", *HINT_PLACES.values()))
    return {name: Location(*place) for name, *place in zip(*columns, strict=True)}


def write_snapshot(store: Store, table: pa.Table, footer: Mapping[str, Any], name: str) -> str:
    """Freeze rows that are in order (columns of `SNAPSHOT`), point `name` at them, and return the snapshot's hash."""
    check_name(name)
    snapshot_hash = hash_rows(table)
    store.write(snapshot_path(snapshot_hash), table_bytes(table, footer, SNAPSHOT))
    store.write(snapshot_name_path(name), json.dumps({"snapshot": snapshot_hash}).encode())
    return snapshot_hash


def hash_rows(table: pa.Table) -> str:
    """Name a snapshot by what its rows identify: `SNAPSHOT_IDENTITY`, and the weights if any row has one."""
    weighted = table["weight"].null_count < len(table)
    names = [*SNAPSHOT_IDENTITY, "weight"] if weighted else SNAPSHOT_IDENTITY
    columns = ((piece.to_pylist() for piece in pieces(table[column])) for column in names)
    return table_digest(FORMAT_VERSION, columns)


def check_name(name: str) -> None:
    """Raise `UsageError` unless `name` can name a snapshot."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"snapshot name {name!r}: use letters, digits, '.', '_' and '-'")


def relocate(cache: Cache, snapshot_hash: str) -> bool:
    """Point a snapshot at where its entries lie now; say whether that changed it and could be done.

    What a snapshot is named after does not change, so neither does the order anyone trains in.
    """
    path = snapshot_path(snapshot_hash)
    table, footer = read_table(cache.store.read(path), SNAPSHOT, f"{cache.url}/{path}")
    if hash_rows(table) != snapshot_hash:
        return False
    places = {kind: Places(cache, kind, table[f"{kind}_key"]) for kind in SAMPLE_KINDS}
    hints = HintPlaces(cache, table)
    everything = pa.array(np.arange(len(table)))
    columns = {name: table[name] for name in SNAPSHOT.names}
    columns |= places["latents"].columns(everything) | places["context"].columns(everything) | hints.columns
    moved = pa.table([columns[name] for name in SNAPSHOT.names], SNAPSHOT.names).cast(SNAPSHOT)
    if (
        moved["latents_shard"].null_count
        or moved["context_shard"].null_count
        or pc.any(pc.is_null(hints.status)).as_py()
    ):
        return False
    try:
        fixed = _fixed_contexts(cache, places["context"].index, footer["null_key"], footer["negative_keys"])
    except LatentlineError:
        return False
    if moved.equals(table) and footer == footer | fixed:
        return False
    cache.store.write(path, table_bytes(moved, footer | fixed))
    return True


def load_snapshot(store: Store, name: str) -> Snapshot:
    """Load a snapshot by its name or its hash; `UsageError` lists the names there are."""
    snapshot_hash = name
    if store.exists(snapshot_name_path(name)):
        snapshot_hash = json.loads(store.read(snapshot_name_path(name)))["snapshot"]
    path = snapshot_path(snapshot_hash)
    try:
        data = store.read(path)
    except FileNotFoundError:
        names = [item.path.split("/")[-1][:-5] for item in store.list("snapshots") if item.path.endswith(".json")]
        known = f"it has {', '.join(names)}" if names else "it has none; run `latentline encode`"
        raise UsageError(f"cache {store.url!r} has no snapshot {name!r}; {known}") from None
    table, footer = read_table(data, SNAPSHOT, f"{store.url}/{path}", dictionary=REPEATED)
    return Snapshot(snapshot_hash, table.unify_dictionaries().combine_chunks(), footer)


def _location(row: Mapping[str, Any], prefix: str) -> Location:
    return Location(row[f"{prefix}shard"], row[f"{prefix}offset"], row[f"{prefix}size"], row[f"{prefix}checksum"])


def _fixed_contexts(
    cache: Cache, contexts: pa.Table, null_key: str, negative_keys: Mapping[str, str]
) -> dict[str, Any]:
    negative = {prompt: asdict(_index_location(cache, contexts, key)) for prompt, key in negative_keys.items()}
    return {"null_context": asdict(_index_location(cache, contexts, null_key)), "negative_contexts": negative}


def _index_location(cache: Cache, index: pa.Table, key: str) -> Location:
    row = pc.index(index["key"], key).as_py()
    if row < 0 or index["status"][row].as_py() != OK:
        raise LatentlineError(f"cache {cache.url!r}: context {key} is not encoded yet; run `latentline encode` again")
    return _location(index.slice(row, 1).to_pylist()[0], "")
