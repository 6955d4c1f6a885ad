"""NVIDIA's inference entries of Transfer: one object of a JSON, JSONL or YAML file a video, its hints named in it.

    {"name": "arm", "prompt": "...", "video_path": "arm.mp4", "edge": {"control_weight": 0.7, "preset_edge_threshold":
     "low"}, "depth": {"control_path": "depth/arm.mp4", "control_weight": 0.3, "mask_path": "mask.mp4"}}

`image_context` is no key of NVIDIA's, whose code embeds an image: it names a file that holds the embedding.
Unknown keys are errors. Paths are relative to the file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infer.controls import num_frames_of, size_of
from infer.entries import VIDEO_SUFFIXES, check_name, existing, prompt_of, validate
from infer.request import Control, Request
from manifests.errors import UsageError
from manifests.hints import COMPUTED, GIVEN, HintKind, Preset
from manifests.image_context import SUFFIXES

_STRICT = ConfigDict(extra="forbid", strict=True)


_INSTEAD = {
    "show_control_condition": "remove it, and set infer.side_by_side = true",
    "show_input": "remove it, and set infer.side_by_side = true",
    "keep_input_resolution": "remove it; a video has the size that `resolution`, or the recipe, says",
    "image_context_path": "give image_context, a file with the image's embedding",
    "context_frame_index": "give image_context, a file with the image's embedding",
    "mask_prompt": "give mask_path, the video of a mask",
    "control_prompt": "give control_path; `latentline encode --make seg` makes such videos",
    "sigma_max": "remove it; every video begins with noise alone",
}
"""Keys that NVIDIA's entries may have and these have not."""


_SIZES = {
    "480": {1: (480, 480), 4 / 3: (480, 640), 3 / 4: (640, 480), 16 / 9: (432, 768), 9 / 16: (768, 432)},
    "720": {1: (960, 960), 4 / 3: (704, 960), 3 / 4: (960, 704), 16 / 9: (704, 1280), 9 / 16: (1280, 704)},
}
"""NVIDIA's classes of resolution: (height, width) by the width over the height that it is for."""


class Hint(BaseModel):
    """A hint. control_path: its video; `edge` and `vis` may do without, and are computed from `video_path`."""

    model_config = _STRICT

    control_path: str | None = None
    control_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    mask_path: str | None = None


class Edge(Hint):
    """preset_edge_threshold: how many edges: `very_low` thresholds keep most."""

    preset_edge_threshold: Preset = "medium"


class Vis(Hint):
    """preset_blur_strength: how strongly the video is blurred."""

    preset_blur_strength: Preset = "medium"


class TransferEntry(BaseModel):
    """One object of NVIDIA's inference JSON for Transfer.

    num_conditional_frames: of the frames so far, that each further chunk begins with. max_frames: the most to make.
    resolution: "height,width" in pixels; "480" or "720" is the size of NVIDIA's of that class whose shape is the
    video's, or nearest. image_context: a file with the embedding of a reference image (`manifests.image_context`).
    """

    model_config = _STRICT

    name: str = Field(min_length=1)
    prompt: str | None = None
    prompt_path: str | None = None
    negative_prompt: str | None = None
    video_path: str | None = None
    edge: Edge | None = None
    vis: Vis | None = None
    depth: Hint | None = None
    seg: Hint | None = None
    image_context: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    num_steps: int | None = Field(default=None, ge=1)
    resolution: str | None = None
    max_frames: int | None = Field(default=None, ge=1)
    num_conditional_frames: Literal[1, 5] | None = None
    num_video_frames_per_chunk: int | None = Field(default=None, ge=1)
    ground_truth: str | None = None


def parse_entry(where: str, folder: Path, raw: dict[str, Any], default: Request) -> Request:
    """The request of one object. It has as many frames as its video, or else as its first control, unless cut."""
    entry = validate(where, raw, TransferEntry, _INSTEAD)
    check_name(where, entry.name)
    prompt = prompt_of(where, folder, entry.prompt, entry.prompt_path)
    source = _video(where, "video_path", folder, entry.video_path)
    controls = [
        _control(where, folder, kind, hint, source)
        for kind in (*COMPUTED, *GIVEN)
        if (hint := getattr(entry, kind)) is not None
    ]
    if not controls:
        raise UsageError(f"{where}: no hint; give one of edge, vis, depth and seg, such as 'edge': {{}}")
    given: dict[str, Any] = {
        "negative_prompt": entry.negative_prompt,
        "seed": entry.seed,
        "guidance": entry.guidance,
        "num_steps": entry.num_steps,
        "chunk_frames": entry.num_video_frames_per_chunk,
        "chunk_overlap": entry.num_conditional_frames,
    }
    if entry.ground_truth is not None:
        given["ground_truth"] = existing(where, "ground_truth", folder / entry.ground_truth)
    if entry.image_context is not None:
        given["image_context"] = _image_context(where, folder, entry)
    first = source or controls[0].path
    assert first is not None
    if entry.resolution is not None:
        given["height"], given["width"] = _size(where, entry.resolution, first)
    frames = num_frames_of(first)
    return replace(
        default,
        name=entry.name,
        prompt=prompt,
        controls=tuple(controls),
        source=source,
        num_frames=min(frames, entry.max_frames or frames),
        **{field: value for field, value in given.items() if value is not None},
    )


def _control(where: str, folder: Path, kind: HintKind, hint: Hint, source: Path | None) -> Control:
    path = _video(where, f"{kind}.control_path", folder, hint.control_path)
    if path is None and kind in GIVEN:
        raise UsageError(
            f"{where}: {kind}: control_path is missing; `latentline encode --make {kind}` makes such videos"
        )
    if path is None and source is None:
        raise UsageError(f"{where}: {kind}: give control_path, or video_path to compute it from")
    presets = {"edge": "preset_edge_threshold", "vis": "preset_blur_strength"}
    preset: Preset = getattr(hint, presets[kind]) if kind in presets else "medium"
    mask = _video(where, f"{kind}.mask_path", folder, hint.mask_path)
    return Control(kind=kind, path=path, weight=hint.control_weight, mask=mask, preset=preset)


def _size(where: str, resolution: str, video: Path) -> tuple[int, int]:
    """(height, width)"""
    if resolution in _SIZES:
        height, width = size_of(video)
        return min(_SIZES[resolution].items(), key=lambda item: abs(width / height - item[0]))[1]
    if not re.fullmatch(r"\d+,\s*\d+", resolution):
        known = " and ".join(repr(name) for name in _SIZES)
        raise UsageError(f"{where}: resolution = {resolution!r}: give 'height,width' in pixels; {known} are known too")
    height, width = (int(side) for side in resolution.split(","))
    return height, width


def _image_context(where: str, folder: Path, entry: TransferEntry) -> Path:
    path = existing(where, "image_context", folder / str(entry.image_context))
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{where}: image_context {path} is no embedding; known suffixes: {' '.join(SUFFIXES)}")
    if entry.vis is not None:
        raise UsageError(f"{where}: vis and image_context both say how the video looks; give one of them")
    return path


def _video(where: str, key: str, folder: Path, path: str | None) -> Path | None:
    if path is None:
        return None
    found = existing(where, key, folder / path)
    if found.suffix.lower() not in VIDEO_SUFFIXES:
        raise UsageError(f"{where}: {key} {found} is no video; known suffixes: {' '.join(VIDEO_SUFFIXES)}")
    return found
