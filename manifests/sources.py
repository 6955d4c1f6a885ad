"""What is known of source videos: hashed and probed once, remembered by location, size and time of change.

The memory lives in the cache as immutable Parquet files, so planning reads each video's bytes once, ever,
and several drivers can add to it at the same time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import pyarrow as pa
import pyarrow.compute as pc

from manifests.cache import Cache
from manifests.keys import digest
from manifests.schema import SOURCES
from manifests.tables import read_table, table_bytes


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """One video file.

    location: absolute path. size: bytes. modified_ns: time of change, nanoseconds since the epoch.
    source_hash: digest of the file's bytes. source_frames, source_fps (average), height, width (pixels, after
    rotation): as probed, None when `error` says why probing failed. frame_times: seconds of each frame from
    the first, kept only where the frame rate varies.
    """

    location: str
    size: int
    modified_ns: int
    source_hash: str
    source_frames: int | None = None
    source_fps: float | None = None
    frame_times: list[float] | None = None
    height: int | None = None
    width: int | None = None
    error: str | None = None


_FACTS = tuple(field.name for field in fields(SourceFacts))


class SourceMemory:
    """Known sources of a cache (None: nothing is known or kept); `add` collects new ones, `save` commits them.

    A probe that failed gives way to one of the same file that did not.
    """

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache
        self._columns: list[list[pa.Array]] = []
        self._places: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._new: dict[tuple[str, int, int], SourceFacts] = {}
        for info in cache.store.list("sources") if cache is not None else ():
            assert cache is not None
            table, _ = read_table(cache.store.read(info.path), SOURCES, f"{cache.url}/{info.path}")
            self._remember(table)

    def get(self, location: str, size: int, modified_ns: int) -> SourceFacts | None:
        place = location, size, modified_ns
        if place in self._new:
            return self._new[place]
        if place not in self._places:
            return None
        file, row = self._places[place]
        return SourceFacts(*(column[row].as_py() for column in self._columns[file]))

    def add(self, facts: SourceFacts) -> None:
        if self.get(facts.location, facts.size, facts.modified_ns) != facts:
            self._new[facts.location, facts.size, facts.modified_ns] = facts

    def save(self) -> None:
        if not self._new or self._cache is None:
            return
        rows = sorted((asdict(facts) for facts in self._new.values()), key=lambda row: row["location"])
        table = pa.Table.from_pylist(rows, schema=SOURCES)
        self._cache.store.write_if_absent(f"sources/{digest(rows)}.parquet", table_bytes(table, {}))
        self._new = {}
        self._remember(table)

    def _remember(self, table: pa.Table) -> None:
        """Keep a table as it is, and where in it each file is: facts are made when they are asked for."""
        places = zip(*(table[name].to_pylist() for name in ("location", "size", "modified_ns")), strict=True)
        failed = pc.is_valid(table["error"]).to_pylist()
        for row, place in enumerate(places):
            if not failed[row] or place not in self._places:
                self._places[place] = len(self._columns), row
        self._columns.append([table[name].combine_chunks() for name in _FACTS])
