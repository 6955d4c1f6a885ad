"""Rows of plans and manifests as jobs for decoders: a window of a video, or hints of one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, Literal

from encode.decode import DecodeJob
from manifests.hints import COMPUTED, GIVEN
from manifests.image_context import IMAGE

_VIS_PATIENCE = 8.0
"""A wide bilateral filter takes a second of a core a frame; that is no sign of a bad video."""

_TOGETHER = 4
"""Hints of one window that are made of one decoding of it. They are all in memory at once: 251 MB each at 704x1280."""

_WINDOW = ("source", "clip_start", "clip_end", "start", "num_frames", "fps", "height", "width")

Row = Mapping[str, Any]


def is_window(row: Row) -> bool:
    """Say whether a row of latents or hints is made of a video: an image context is a file as it is."""
    return row.get("hint") != IMAGE


def facts_of(row: Row) -> dict[str, Any]:
    """What an entry says of where it came from."""
    facts = {name: row[name] for name in ("source", "source_hash", *_WINDOW[1:])}
    return facts | {"hint": row["hint"], "parameters": _parameters(row)} if row.get("hint") else facts


def by_window(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that one job decodes: neighbours that are computed of the same window, any other row alone."""
    for computed, run in groupby(rows, lambda row: row.get("hint") in COMPUTED and [row[name] for name in _WINDOW]):
        while group := list(islice(run, _TOGETHER if computed else 1)):
            yield group


def decode_job(rows: Sequence[Row], resize: Literal["stretch", "pad"]) -> DecodeJob:
    """What to decode for rows that `by_window` put together. resize: `encode.resize`."""
    row = rows[0]
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear" if resize == "stretch" else "bicubic"
    if row.get("hint") in GIVEN:
        interpolation = "bilinear" if row["hint"] == "depth" else "nearest"
    computed = tuple((row["hint"], _parameters(row)) for row in rows if row.get("hint") in COMPUTED)
    box = _parameters(row).get("box")
    return DecodeJob(
        resize=resize,
        interpolation=interpolation,
        box=None if box is None else tuple(box),
        hints=computed,
        patience=sum(_VIS_PATIENCE if hint == "vis" else 1.0 for hint, _ in computed) or 1.0,
        path=row["source"],
        first=row["start"],
        num_frames=row["num_frames"],
        fps=row["fps"],
        start=row["clip_start"],
        end=row["clip_end"],
        height=row["height"],
        width=row["width"],
    )


def _parameters(row: Row) -> dict[str, Any]:
    return json.loads(row.get("parameters") or "{}")
