"""`data.datasets.<name>.filters`: which videos are left out, by what is known of them before anything is decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from encode.config import DataConfig, FiltersConfig
from encode.sources import SourceItem, Sources, read_sources
from encode.windows import target_frames
from manifests.errors import UsageError
from manifests.filters import ROW, matching
from manifests.sources import SourceFacts


def filtered_sources(data: DataConfig) -> Sources:
    """What the recipe's datasets name, without the items that a `filters.where` leaves out; those are counted.

    Raises `UsageError` as `read_sources` does, for a condition that makes no sense, and for one on a dataset that has
    no values to compare.
    """
    found = read_sources(data)
    for name, dataset in data.datasets.items():
        if dataset.filters.where is not None:
            own = [item for item in found.items if item.dataset == name]
            kept = _matching(name, dataset.filters.where, own)
            found.left_out[name]["where"] += len(own) - len(kept)
            ids = {id(item) for item in kept}
            found.items[:] = [item for item in found.items if item.dataset != name or id(item) in ids]
    return found


def failing(filters: FiltersConfig, item: SourceItem, facts: SourceFacts) -> str | None:
    """The first filter, in the order of `FiltersConfig`, that leaves an item out; None if it stays.

    facts: of its video, which was probed without an error.
    """
    assert facts.source_frames is not None
    assert facts.source_fps is not None
    assert facts.height is not None
    assert facts.width is not None
    num_frames, seconds = _length(item, facts, facts.source_frames, facts.source_fps)
    fails = {
        "min_frames": filters.min_frames is not None and num_frames < filters.min_frames,
        "min_seconds": filters.min_seconds is not None and seconds < filters.min_seconds,
        "max_seconds": filters.max_seconds is not None and seconds > filters.max_seconds,
        "min_height": filters.min_height is not None and facts.height < filters.min_height,
        "min_width": filters.min_width is not None and facts.width < filters.min_width,
        "min_fps": filters.min_fps is not None and facts.source_fps < filters.min_fps,
    }
    return next((name for name, failed in fails.items() if failed), None)


def _matching(name: str, where: str, items: list[SourceItem]) -> list[SourceItem]:
    label = f"data.datasets.{name}.filters.where"
    columns = dict.fromkeys(key for item in items for key, value in item.facts.items() if _is_plain(value))
    if not columns:
        raise UsageError(f"{label} {where!r}: this dataset has no values beside its captions to compare with")
    values = {ROW: pa.array(range(len(items)))}
    for column in columns:
        try:
            values[column] = pa.array([item.facts.get(column) for item in items])
        except (pa.ArrowException, TypeError):
            values[column] = pa.array([[]] * len(items))  # of mixed types: known, and nothing can be asked of it
    return [items[index] for index in matching(pa.table(values), where, label)[ROW].to_pylist()]


def _length(item: SourceItem, facts: SourceFacts, source_frames: int, source_fps: float) -> tuple[int, float]:
    """(source frames, seconds) of the part of the video that is used."""
    if item.start is None and item.end is None:
        return source_frames, source_frames / source_fps
    times = np.arange(source_frames) / source_fps if facts.frame_times is None else np.asarray(facts.frame_times)
    num_frames = len(target_frames(times, None, item.start, item.end))
    return num_frames, num_frames / source_fps


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
