"""Where the entries that samples are made of lie, found by their keys in the cache's index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import Cache
from manifests.schema import OK, SAMPLE_KINDS, SNAPSHOT

LOCATED = ("key", "status", "shard", "offset", "size", "checksum", "shape")
_PLACES = {f"{kind}_{name}" for kind in (*SAMPLE_KINDS, "hint") for name in ("shard", "offset", "size", "checksum")} | {
    "latents_shape"
}
REPEATED = (
    "dataset", "context_key", "source", "source_hash", "caption", "caption_name", "captions_key", "latents_shard",
    "context_shard", "context_checksum",
)  # fmt: skip
HINT_PLACES = {name: f"hint_{name}s" for name in ("shard", "offset", "size", "checksum")}


@dataclass(frozen=True)
class Location:
    """Where an entry's safetensors bytes lie.

    shard: path of the tar in the cache. offset, size: bytes. checksum: SHA-256 of those bytes.
    """

    shard: str
    offset: int
    size: int
    checksum: str


def plain(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


class Places:
    """Where the entries of some keys lie: the cache's index of a kind, and each key's row in it, null if unknown."""

    def __init__(self, cache: Cache, kind: str, keys: pa.ChunkedArray) -> None:
        self._kind = kind
        self.index = cache.index(kind, LOCATED, dictionary=["shard"])
        self._rows = pc.index_in(keys, value_set=self.index["key"]).combine_chunks()

    def column(self, name: str, order: pa.Array | None = None) -> pa.ChunkedArray:
        column = self.index[name] if order is None else compact(self.index[name], f"{self._kind}_{name}")
        return column.take(self._rows if order is None else self._rows.take(order))

    def columns(self, order: pa.Array) -> dict[str, pa.ChunkedArray]:
        """The columns of `SNAPSHOT` that say where the entries are, for keys taken in an order."""
        names = [name for name in LOCATED if f"{self._kind}_{name}" in _PLACES]
        return {f"{self._kind}_{name}": self.column(name, order) for name in names}


class HintPlaces:
    """Where the hints of samples lie: lists, an item a hint, null for samples without.

    status: of each sample's hints together: null if one is unknown, else the first that is not OK, else OK.
    """

    def __init__(self, cache: Cache, samples: pa.Table) -> None:
        self.columns: dict[str, Any] = {}
        lists = plain(samples["hint_keys"])
        self.status = pa.chunked_array([pa.repeat(OK, len(samples))])
        if lists.null_count == len(lists):
            self.columns = {name: pa.nulls(len(samples), SNAPSHOT.field(name).type) for name in HINT_PLACES.values()}
            return
        keys = pc.list_flatten(lists)
        places = Places(cache, "hint", pa.chunked_array([keys]))
        parents = pc.list_parent_indices(lists).to_pylist()
        found: list[str | None] = [OK] * len(samples)
        for parent, status in zip(parents, places.column("status").to_pylist(), strict=True):
            if status is None or found[parent] == OK:
                found[parent] = status
        self.status = pa.chunked_array([pa.array(found, pa.string())])
        lengths = pc.fill_null(pc.list_value_length(lists), 0)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths.to_numpy())]), pa.int32())
        for name, column in HINT_PLACES.items():
            values = plain(places.column(name)).cast(SNAPSHOT.field(column).type.value_type)
            self.columns[column] = pa.ListArray.from_arrays(offsets, values, mask=lists.is_null())


def compact(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A column with each value held once, if it is one that repeats its values."""
    return pa.chunked_array([column.combine_chunks().dictionary_encode()]) if name in REPEATED else column
