"""Names for everything a job wants, collected in columns: a million windows cost a list of keys, not of rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.config import EncodeConfig
from encode.sources import SourceItem
from encode.windows import TooShort, num_target_frames, plan_windows
from manifests import keys
from manifests.cache import is_first
from manifests.schema import SNAPSHOT, WANTED
from manifests.sources import SourceFacts

Clip: TypeAlias = tuple[str, float | None, float | None]
"""A source video's path and the seconds of it that are used; None where it is all of it."""

SAMPLE_COLUMNS = (
    "dataset", "latents_key", "context_key", "source", "source_hash", "start", "num_frames", "fps", "caption",
    "caption_name", "captions_key", "weight",
)  # fmt: skip

_PIECE = 65_536
_ITEM = pa.schema(
    [
        SNAPSHOT.field("dataset"),
        SNAPSHOT.field("context_key"),
        *(SNAPSHOT.field(name) for name in ("caption", "caption_name", "captions_key", "weight")),
        *(WANTED.field(name) for name in ("source", "source_hash", "clip_start", "clip_end", "error")),
    ]
)


class Names:
    """Collects wanted entries and samples of one job.

    fingerprints: of the producers, by kind. num_windows: of all items, each counted once whatever its captions.
    """

    def __init__(self, config: EncodeConfig, fingerprints: dict[str, str]) -> None:
        self._config = config
        self._fingerprints = fingerprints
        self._contexts: dict[str | None, str] = {}
        self._items: list[tuple[Any, ...]] = []
        self._item_tables: list[pa.Table] = []
        self._counts: list[int] = []
        self._keys: list[str] = []
        self._starts: list[int] = []
        self._windows: list[pa.Table] = []
        self._num_frames: dict[tuple[Any, ...], int] = {}
        self.num_windows = 0

    def context(self, caption: str | None) -> str:
        """Want the context of a caption; return its key."""
        key = self._contexts.get(caption)
        if key is None:
            key = keys.context_key(caption=caption, fingerprint=self._fingerprints["context"])
            self._contexts[caption] = key
        return key

    def windows(self, item: SourceItem, facts: SourceFacts) -> str | None:
        """Want the item's windows; return why it has none that can be encoded, if so."""
        config = self._config
        error, starts = facts.error, [0]
        if error is None:
            count = self._num_target_frames(item, facts)
            try:
                starts = plan_windows(count, config.num_frames, config.windows, facts.source_hash, config.target_fps)
            except TooShort as short:
                error = str(short)
        location, clip_start, clip_end = clip_of(item, facts)
        window_keys = keys.latents_keys(
            source_hash=facts.source_hash,
            clip=None if clip_start is None else (clip_start, clip_end),
            fingerprint=self._fingerprints["latents"],
            starts=starts,
            num_frames=config.num_frames,
            fps=config.target_fps,
            height=config.height,
            width=config.width,
        )
        self.num_windows += len(starts)
        contexts = {name: self.context(caption) for name, caption in item.captions.items()}
        several = len(contexts) > 1 or "" not in contexts
        captions_key = keys.captions_key(contexts) if several else None
        for name, caption in item.captions.items():
            self._keys += window_keys
            self._starts += starts
            self._counts.append(len(starts))
            captions = contexts[name], caption, name if several else None, captions_key, item.weight
            self._items.append((item.dataset, *captions, location, facts.source_hash, clip_start, clip_end, error))
        if len(self._keys) >= _PIECE or len(self._items) >= _PIECE:
            self._flush()
        return error

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """(wanted entries, no key twice, schema `WANTED`; samples, a row a window and caption, `SAMPLE_COLUMNS`)."""
        self._flush()
        samples = pa.concat_tables([_sample_schema().empty_table(), *(self._samples(rows) for rows in self._windows)])
        wanted = [WANTED.empty_table(), *(self._wanted(rows) for rows in self._windows), self._wanted_contexts()]
        return first_of_each(pa.concat_tables(wanted)), samples

    def _num_target_frames(self, item: SourceItem, facts: SourceFacts) -> int:
        """Steady videos of one length and rate have one answer."""
        if facts.frame_times is not None:
            return num_target_frames(np.asarray(facts.frame_times), self._config.target_fps, item.start, item.end)
        alike = facts.source_frames, facts.source_fps, item.start, item.end
        if alike not in self._num_frames:
            assert facts.source_frames is not None
            assert facts.source_fps is not None
            times = np.arange(facts.source_frames) / facts.source_fps
            self._num_frames[alike] = num_target_frames(times, self._config.target_fps, item.start, item.end)
        return self._num_frames[alike]

    def _flush(self) -> None:
        """Turn what was collected into a table of windows: each item's columns, its key and its start."""
        if not self._items:
            return
        columns = zip(*self._items, strict=True)
        items = pa.table([pa.array(c, f.type) for c, f in zip(columns, _ITEM, strict=True)], schema=_ITEM)
        rows = items.take(pa.array(_repeats(self._counts)))
        rows = rows.append_column("key", pa.array(self._keys, pa.string()))
        self._windows.append(rows.append_column("start", pa.array(self._starts, pa.int64())))
        self._items, self._counts, self._keys, self._starts = [], [], [], []

    def _samples(self, rows: pa.Table) -> pa.Table:
        return _with_columns(rows, self._geometry() | {"latents_key": rows["key"]}, _sample_schema())

    def _wanted(self, rows: pa.Table) -> pa.Table:
        return _with_columns(rows, self._geometry() | {"kind": "latents", "caption": None}, WANTED)

    def _wanted_contexts(self) -> pa.Table:
        columns = {"key": pa.array(self._contexts.values(), pa.string())}
        columns |= {"caption": pa.array(self._contexts, pa.string())}
        return _with_columns(pa.table(columns), {"kind": "context"}, WANTED)

    def _geometry(self) -> dict[str, Any]:
        config = self._config
        size = {"height": config.height, "width": config.width}
        return {"num_frames": config.num_frames, "fps": config.target_fps, **size}


def clip_of(item: SourceItem, facts: SourceFacts) -> Clip:
    """The part of a video that an item is."""
    whole = item.start is None and item.end is None
    return facts.location, None if whole else item.start or 0.0, item.end


def first_of_each(table: pa.Table) -> pa.Table:
    """Rows whose `key` has not come before."""
    keys = table["key"].combine_chunks()
    order = pc.sort_indices(keys)
    order = order.filter(is_first(keys.take(order)))
    return table if len(order) == len(table) else table.take(order.sort())


def _with_columns(rows: pa.Table, given: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """`rows` in a schema: given columns first, values repeated, what is in neither null."""
    columns = []
    for field in schema:
        value = given.get(field.name, rows[field.name] if field.name in rows.column_names else None)
        if not isinstance(value, pa.ChunkedArray):
            value = pa.repeat(pa.scalar(value, field.type), len(rows))
        columns.append(value)
    return pa.table(columns, schema=schema)


def _sample_schema() -> pa.Schema:
    return pa.schema([SNAPSHOT.field(name) for name in SAMPLE_COLUMNS])


def _repeats(counts: list[int]) -> npt.NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)
