"""Rows of plans and manifests as jobs for decoders: a window of a video, or the hint of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from encode.decode import DecodeJob
from manifests.hints import COMPUTED, GIVEN

_VIS_PATIENCE = 8.0
"""A wide bilateral filter takes seconds of a core a frame; that is no sign of a bad video."""


def decode_job(row: Mapping[str, Any], resize: Literal["stretch", "pad"]) -> DecodeJob:
    """What to decode for a row of a plan: a window of a video, or the hint of one. resize: `encode.resize`."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear" if resize == "stretch" else "bicubic"
    hint, parameters = row.get("hint"), json.loads(row.get("parameters") or "{}")
    if hint in GIVEN:
        interpolation = "bilinear" if hint == "depth" else "nearest"
    box = parameters.get("box")
    return DecodeJob(
        resize=resize,
        interpolation=interpolation,
        box=None if box is None else tuple(box),
        hint=(hint, parameters) if hint in COMPUTED else None,
        patience=_VIS_PATIENCE if hint == "vis" else 1.0,
        path=row["source"],
        first=row["start"],
        num_frames=row["num_frames"],
        fps=row["fps"],
        start=row["clip_start"],
        end=row["clip_end"],
        height=row["height"],
        width=row["width"],
    )
