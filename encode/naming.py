"""Names for everything a job wants, collected in columns: a million windows cost a list of keys, not of rows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encode.config import EncodeConfig
from encode.sources import SourceItem
from encode.windows import TooShort, num_target_frames, plan_windows
from manifests import hints, keys
from manifests.cache import is_first
from manifests.image_context import IMAGE, NO_WINDOW
from manifests.padding import content_box, padding_of
from manifests.schema import SNAPSHOT, WANTED
from manifests.sources import SourceFacts

Clip: TypeAlias = tuple[str, float | None, float | None]
"""A source video's path and the seconds of it that are used; None where it is all of it."""

SAMPLE_COLUMNS = (
    "dataset", "latents_key", "context_key", "source", "source_hash", "start", "num_frames", "fps", "caption",
    "caption_name", "captions_key", "weight", "hints_key", "padding", "hint_names", "hint_keys",
)  # fmt: skip

_PIECE = 65_536
_SAME_RATE = 0.005
"""Frame rates that differ by a smaller share count as one: 30 and 30000 / 1001."""

_ITEM = pa.schema(
    [
        SNAPSHOT.field("dataset"),
        SNAPSHOT.field("context_key"),
        *(SNAPSHOT.field(name) for name in ("caption", "caption_name", "captions_key", "weight", "padding")),
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
        self._hints_of: list[tuple[str | None, list[str] | None, list[str] | None]] = []
        self._hint_rows: list[dict[str, Any]] = []
        self._wanted_hints: list[pa.Table] = []
        self._num_frames: dict[tuple[Any, ...], int] = {}
        self.num_windows = 0

    def context(self, caption: str | None) -> str:
        """Want the context of a caption; return its key."""
        key = self._contexts.get(caption)
        if key is None:
            key = keys.context_key(caption=caption, fingerprint=self._fingerprints["context"])
            self._contexts[caption] = key
        return key

    def windows(
        self, item: SourceItem, facts: SourceFacts, hint_facts: Mapping[str, SourceFacts] = MappingProxyType({})
    ) -> str | None:
        """Want the item's windows; return why it has none that can be encoded, if so.

        hint_facts: of the item's given hints, by kind.
        """
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
        hints_of: list[tuple[str | None, list[str] | None, list[str] | None]] = []
        if config.hints.kinds:
            hints_of = [(None, None, None)] * len(starts)
            if error is None:
                hints_of = [self._hints(item, facts, hint_facts, start) for start in starts]
        padding = self._padding(facts) if error is None else None
        contexts = {name: self.context(caption) for name, caption in item.captions.items()}
        several = len(contexts) > 1 or "" not in contexts
        captions_key = keys.captions_key(contexts) if several else None
        for name, caption in item.captions.items():
            self._keys += window_keys
            self._starts += starts
            self._hints_of += hints_of
            self._counts.append(len(starts))
            captions = contexts[name], caption, name if several else None, captions_key, item.weight, padding
            self._items.append((item.dataset, *captions, location, facts.source_hash, clip_start, clip_end, error))
        if len(self._keys) >= _PIECE or len(self._items) >= _PIECE:
            self._flush()
        return error

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """(wanted entries, no key twice, schema `WANTED`; samples, a row a window and caption, `SAMPLE_COLUMNS`)."""
        self._flush()
        samples = pa.concat_tables([_sample_schema().empty_table(), *(self._samples(rows) for rows in self._windows)])
        wanted = [WANTED.empty_table(), *(self._wanted(rows) for rows in self._windows), self._wanted_contexts()]
        wanted += self._wanted_hints
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
        rows = rows.append_column("start", pa.array(self._starts, pa.int64()))
        names = ("hints_key", "hint_names", "hint_keys") if self._hints_of else ()
        for name, values in zip(names, zip(*self._hints_of, strict=True), strict=True):
            rows = rows.append_column(name, pa.array(values, SNAPSHOT.field(name).type))
        self._windows.append(rows)
        self._wanted_hints.append(pa.Table.from_pylist(self._hint_rows, schema=WANTED))
        self._items, self._counts, self._keys, self._starts = [], [], [], []
        self._hints_of, self._hint_rows = [], []

    def _samples(self, rows: pa.Table) -> pa.Table:
        return _with_columns(rows, self._geometry() | {"latents_key": rows["key"]}, _sample_schema())

    def _wanted(self, rows: pa.Table) -> pa.Table:
        return _with_columns(rows, self._geometry() | {"kind": "latents", "caption": None}, WANTED)

    def _wanted_contexts(self) -> pa.Table:
        columns = {"key": pa.array(self._contexts.values(), pa.string())}
        columns |= {"caption": pa.array(self._contexts, pa.string())}
        return _with_columns(pa.table(columns), {"kind": "context"}, WANTED)

    def _hints(
        self, item: SourceItem, facts: SourceFacts, hint_facts: Mapping[str, SourceFacts], start: int
    ) -> tuple[str | None, list[str] | None, list[str] | None]:
        """Want the hints of one window: (hints_key, names, keys)."""
        found: dict[str, str] = {}
        _, clip_start, clip_end = clip_of(item, facts)
        clip = None if clip_start is None else (clip_start, clip_end)
        geometry = self._geometry()
        for kind in self._config.hints.kinds:
            given = hint_facts.get(kind)
            source = given or facts
            error = None if given is None else self._fault_of_given(kind, item, facts, given, start)
            for variant, parameters in enumerate(self._parameters(kind, facts, clip, start)):
                text = hints.parameters_text(parameters)
                key = keys.hint_key(
                    hint=kind,
                    parameters=text,
                    source_hash=source.source_hash,
                    clip=clip,
                    start=start,
                    fingerprint=self._fingerprints["hint"],
                    **geometry,
                )
                found[hints.name_of(kind, variant)] = key
                row: dict[str, Any] = {
                    "key": key,
                    "kind": "hint",
                    "source": source.location,
                    "source_hash": source.source_hash,
                }
                row |= {"clip_start": clip_start, "clip_end": clip_end, "start": start, "error": error}
                self._hint_rows.append(row | geometry | {"hint": kind, "parameters": text})
        if IMAGE in hint_facts:
            found[IMAGE] = self._image_context(hint_facts[IMAGE])
        return keys.hints_key(found), list(found), list(found.values())

    def _image_context(self, facts: SourceFacts) -> str:
        """Want an image context; return its key."""
        key = keys.hint_key(
            hint=IMAGE,
            parameters=hints.parameters_text({}),
            source_hash=facts.source_hash,
            clip=None,
            fingerprint=self._fingerprints["hint"],
            **NO_WINDOW,
        )
        row = {"key": key, "kind": "hint", "source": facts.location, "source_hash": facts.source_hash}
        self._hint_rows.append(row | {"hint": IMAGE, "parameters": hints.parameters_text({}), **NO_WINDOW})
        return key

    def _parameters(
        self, kind: hints.HintKind, facts: SourceFacts, clip: tuple[float, float | None] | None, start: int
    ) -> list[dict[str, Any]]:
        """What each variant of a hint is made with. A given one is put where its video's picture is."""
        config = self._config
        if kind in hints.GIVEN:
            return [{"box": self._box(facts)} if config.resize == "pad" else {}]
        preset = config.hints.edge_preset if kind == "edge" else config.hints.vis_preset
        if preset is not None:
            return [hints.preset_parameters(kind, preset)]
        window = keys.digest([facts.source_hash, clip, start, config.num_frames, config.target_fps, config.hints.seed])
        return [hints.training_parameters(kind, f"{window}/{variant}") for variant in range(config.hints.variants)]

    def _fault_of_given(
        self, kind: str, item: SourceItem, facts: SourceFacts, given: SourceFacts, start: int
    ) -> str | None:
        """Why a control video does not cover a window, if so. Another size or frame rate is no fault: times count."""
        config, label = self._config, f"the {kind} video {given.location}"
        if given.error is not None:
            return f"the {kind} video {given.error}"
        assert facts.source_fps is not None
        assert given.source_fps is not None
        if config.target_fps is None and abs(given.source_fps / facts.source_fps - 1) > _SAME_RATE:
            rates = f"has {given.source_fps:.3f} fps, its video {facts.source_fps:.3f}"
            return f"{label} {rates}; set encode.fps, so that frames are taken by time"
        count, needed = self._num_target_frames(item, given), start + config.num_frames
        return None if count >= needed else f"{label} is too short: {count} frames, the window ends with frame {needed}"

    def _box(self, facts: SourceFacts) -> tuple[int, int, int, int]:
        assert facts.height is not None
        assert facts.width is not None
        return content_box(facts.height, facts.width, self._config.height, self._config.width)

    def _padding(self, facts: SourceFacts) -> list[int] | None:
        if self._config.resize == "stretch":
            return None
        return list(padding_of(self._box(facts), self._config.height, self._config.width))

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
