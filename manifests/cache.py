"""A cache opened: its format checked, its committed entries indexed.

Only manifests count. A tar without a manifest is an abandoned attempt and invisible here. Where compacted
manifests (`manifests.compact`) cover shards, those shards' own manifests are not read, and a plan that is
covered whole is not even listed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import CorruptError, UsageError
from manifests.keys import FORMAT_VERSION
from manifests.schema import COMPACTED, MANIFEST, OK, QUARANTINED, manifest_path
from manifests.store import Store
from manifests.tables import TEXT, read_table

_FORMAT_FILE = "format.json"
_READERS = 8
_FETCHED = 1024
"""Manifests held as bytes at a time, at most."""


@dataclass(frozen=True)
class KindSummary:
    """Counts of one kind: entries, shards, bytes of entries, quarantined rows."""

    kind: str
    entries: int
    shards: int
    bytes: int
    quarantined: int


@dataclass(frozen=True)
class _Compacted:
    """What compacted manifests of a kind say. rows: no shard twice. sealed: tags of plans that are covered whole."""

    rows: pa.Table
    shard_ids: pa.Array
    sealed: tuple[str, ...]


class Cache:
    """The committed state of a cache.

    create: open it for writing; made if it is not there.
    Raises `UsageError` if the folder is no cache (unless `create`), was written by a newer latentline, or is to be
    written to in a store that lets writers replace each other's objects.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.store = Store(url, create=create)
        self.url = url
        if create:
            self.store.require_put_if_absent()
        if create and not self.store.exists(_FORMAT_FILE):
            self.store.write_if_absent(_FORMAT_FILE, json.dumps({"format": FORMAT_VERSION}).encode())
        try:
            found = int(json.loads(self.store.read(_FORMAT_FILE))["format"])
        except FileNotFoundError:
            raise UsageError(
                f"cache {url!r}: no {_FORMAT_FILE}, so not a latentline cache; run `latentline encode` first"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{url}/{_FORMAT_FILE}: unreadable") from error
        if found > FORMAT_VERSION:
            raise UsageError(
                f"cache {url!r} has format {found}, this latentline reads up to {FORMAT_VERSION}; upgrade latentline"
            )

    def shard_ids(self, kind: str) -> pa.Array:
        """Return the ids of the committed shards of a kind, sorted."""
        compacted = self._compacted(kind, ())
        ids = pa.concat_arrays([compacted.shard_ids, self._listed(kind, compacted)])
        return ids.take(pc.sort_indices(ids))

    def uncompacted(self, kind: str) -> pa.Array:
        """Return the ids of the committed shards of a kind that no compacted manifest covers, sorted."""
        return self._listed(kind, self._compacted(kind, ()))

    def manifest(self, kind: str, shard_id: str) -> tuple[pa.Table, dict[str, Any]]:
        """Read one shard's manifest: its rows and its footer."""
        path = manifest_path(kind, shard_id)
        return read_table(self.store.read(path), MANIFEST, f"{self.url}/{path}")

    def rows(
        self, kind: str, columns: Sequence[str] = tuple(MANIFEST.names), *, dictionary: Sequence[str] = ()
    ) -> pa.Table:
        """All committed rows of a kind; keys may repeat after a race.

        columns: of `MANIFEST`, or `shard_id`. dictionary: columns of text to hold each value of once.
        """
        compacted = self._compacted(kind, columns, dictionary)
        listed = self.read_manifests(kind, self._listed(kind, compacted).to_pylist(), columns, dictionary=dictionary)
        return pa.concat_tables([compacted.rows.select(columns), listed])

    def read_manifests(
        self,
        kind: str,
        shard_ids: Sequence[str],
        columns: Sequence[str] = tuple(COMPACTED.names),
        *,
        dictionary: Sequence[str] = (),
    ) -> pa.Table:
        """Rows of the given shards' own manifests, columns of `COMPACTED`."""
        wanted = [name for name in columns if name != "shard_id"] or ["key"]
        paths = [manifest_path(kind, shard_id) for shard_id in shard_ids]
        tables = [_schema(wanted, dictionary).empty_table()]
        lengths: list[int] = []
        # Threads fetch and do not parse: small files parse faster one by one than in turns.
        with ThreadPoolExecutor(_READERS) as readers:
            for begin in range(0, len(paths), _FETCHED):
                piece = paths[begin : begin + _FETCHED]
                found = [
                    read_table(data, MANIFEST, f"{self.url}/{path}", wanted, dictionary=dictionary)[0]
                    for path, data in zip(piece, readers.map(self.store.read, piece), strict=True)
                ]
                lengths += map(len, found)
                tables.append(pa.concat_tables(found).combine_chunks())
        rows = pa.concat_tables(tables)
        if "shard_id" in columns:
            places: npt.NDArray[np.int64] = np.arange(len(paths)).repeat(np.array(lengths, np.int64))
            ids = pa.array(shard_ids, pa.string()).take(pa.array(places))
            rows = rows.append_column("shard_id", ids.dictionary_encode() if "shard_id" in dictionary else ids)
        return rows.select(columns)

    def index(
        self, kind: str, columns: Sequence[str] = tuple(MANIFEST.names), *, dictionary: Sequence[str] = ()
    ) -> pa.Table:
        """One row a key: an `ok` row if there is one, else the quarantined one; the first shard's by name."""
        rows = self.rows(kind, list(dict.fromkeys([*columns, "key"])), dictionary=dictionary)
        keys = rows["key"].combine_chunks()
        order = pc.sort_indices(keys)
        if pc.all(is_first(keys.take(order)), min_count=0).as_py():
            return rows.select(columns)
        needed = list(dict.fromkeys([*columns, "key", "status", "shard_id"]))
        rows = self.rows(kind, needed, dictionary=dictionary)
        rank = pc.cast(pc.not_equal(rows["status"], OK), pa.int8())
        sort_keys = [("key", "ascending"), ("rank", "ascending"), ("shard_id", "ascending")]
        order = pc.sort_indices(rows.select(["key", "shard_id"]).append_column("rank", rank), sort_keys)
        keys = rows["key"].take(order).combine_chunks()
        return rows.select(columns).take(order.filter(is_first(keys)))

    def summary(self, kind: str) -> KindSummary:
        index = self.index(kind, ["status", "shard", "size"])
        good = index.filter(pc.equal(index["status"], OK))
        return KindSummary(
            kind=kind,
            entries=len(good),
            shards=pc.count_distinct(good["shard"]).as_py(),
            bytes=pc.sum(good["size"]).as_py() or 0,
            quarantined=len(index.filter(pc.equal(index["status"], QUARANTINED))),
        )

    def _compacted(self, kind: str, columns: Sequence[str], dictionary: Sequence[str] = ()) -> _Compacted:
        names = list(dict.fromkeys([*columns, "shard_id"]))
        dictionary = [*dictionary, *({"shard_id"} - set(columns))]
        tables = [_schema(names, dictionary).empty_table()]
        covered: set[str] = set()
        plans: dict[str, list[int]] = {}
        for info in self.store.list(f"compacted/{kind}"):
            data = self.store.read(info.path)
            table, footer = read_table(data, COMPACTED, f"{self.url}/{info.path}", names, dictionary=dictionary)
            ids = set(pc.unique(table["shard_id"]).to_pylist())
            repeated = ids & covered
            if repeated:
                table = table.filter(pc.invert(pc.is_in(table["shard_id"], value_set=pa.array(sorted(repeated)))))
            tables.append(table)
            covered |= ids
            plans.setdefault(footer["tag"], [footer["plan_shards"]]).append(len(ids - repeated))
        return _Compacted(
            rows=pa.concat_tables(tables),
            shard_ids=pa.array(sorted(covered), pa.string()),
            sealed=tuple(sorted(tag for tag, (expected, *parts) in plans.items() if sum(parts) == expected)),
        )

    def _listed(self, kind: str, compacted: _Compacted) -> pa.Array:
        """Ids of committed shards that no compacted manifest covers, sorted."""
        names = self.store.names(f"entries/{kind}", skip=compacted.sealed)
        ids = pa.array(sorted(name[:-8] for name in names if name.endswith(".parquet")), pa.string())
        return ids.filter(pc.invert(pc.is_in(ids, value_set=compacted.shard_ids)))


def _schema(columns: Sequence[str], dictionary: Sequence[str]) -> pa.Schema:
    """Types as `read_table` gives them."""
    plain = [COMPACTED.field(name) for name in columns]
    return pa.schema([field.with_type(TEXT) if field.name in dictionary else field for field in plain])


def without_keys(table: pa.Table, keys: pa.ChunkedArray) -> pa.Table:
    """Rows whose `key` is not among `keys`; the table itself where that is all of them."""
    found = pc.is_in(table["key"], value_set=keys)
    return table.filter(pc.invert(found)) if pc.any(found).as_py() else table


def is_first(values: pa.Array) -> pa.Array:
    """True where a sorted array's value differs from the one before."""
    if len(values) < 2:
        return pa.array([True] * len(values), pa.bool_())
    return pa.concat_arrays([pa.array([True]), pc.not_equal(values.slice(1), values.slice(0, len(values) - 1))])
