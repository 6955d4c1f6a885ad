"""The pixels of a request's hints and masks, a piece of the video at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from infer.grid import write_grid
from infer.request import Control, Request
from infer.video import Frames, iterate_frames, video_writer
from manifests.errors import LatentlineError, UsageError
from manifests.hints import make_hint, preset_parameters

_SAME_RATE = 0.005
_PIECE = 64


@functools.lru_cache(maxsize=1024)
def num_frames_of(video: Path) -> int:
    """Frames of a video, counted; UsageError if it cannot be read."""
    try:
        return sum(1 for _ in iterate_frames(video))
    except LatentlineError as error:
        raise UsageError(str(error)) from error


def size_of(video: Path) -> tuple[int, int]:
    """(height, width) of a video's frames; UsageError if it cannot be read."""
    try:
        height, width, _ = next(iterate_frames(video)).shape
    except LatentlineError as error:
        raise UsageError(str(error)) from error
    return height, width


@functools.lru_cache(maxsize=1024)
def fps_of_video(video: Path) -> float:
    """Mean frames a second that a video states; UsageError if it states none."""
    try:
        with av.open(str(video)) as container:
            rate = container.streams.video[0].average_rate
    except (OSError, IndexError, av.FFmpegError) as error:
        raise UsageError(f"{video}: cannot read this video") from error
    if not rate:
        raise UsageError(f"{video}: states no frame rate; write it anew with one")
    return float(rate)


def fps_of(request: Request) -> float:
    """Frames a second of a request's video: those of its source, or of its first control."""
    return fps_of_video(_first(request))


def check_files(request: Request) -> None:
    """Raise UsageError for a hint or mask that does not go with the request's video. Any size will do."""
    first = _first(request)
    for control in request.controls:
        for what, path in (("video", control.path), ("mask", control.mask)):
            if path is None:
                continue
            label = f"{request.name}: the {control.kind} {what} {path}"
            if (count := num_frames_of(path)) < request.num_frames:
                raise UsageError(f"{label} has {count} frames, {request.num_frames} are to be made; see max_frames")
            if abs((rate := fps_of_video(path)) / fps_of_video(first) - 1) > _SAME_RATE:
                raise UsageError(
                    f"{label} has {rate:g} fps, {first} has {fps_of_video(first):g}; bring them to one rate"
                )


def hint_frames(request: Request, control: Control, start: int, count: int) -> Frames:
    """`count` frames of a hint from frame `start` on, at the request's size; the last is repeated past its end."""
    path = control.path or request.source
    assert path is not None
    frames_THWC = _frames(path, request, start, count, nearest=control.kind == "seg")
    if control.path is not None:
        return frames_THWC
    parameters = preset_parameters(control.kind, control.preset)
    return np.stack([make_hint(control.kind, parameters, frame) for frame in frames_THWC])


def mask_frames(request: Request, control: Control, start: int, count: int) -> NDArray[np.float32] | None:
    """[count, H, W] in 0 to 1, at the request's size; None where the hint counts everywhere."""
    if control.mask is None:
        return None
    frames_THWC = _frames(control.mask, request, start, count, nearest=True)
    return frames_THWC.mean(-1).astype(np.float32) / 255.0


def patch_weights(
    weights: Sequence[float], masks: Sequence[NDArray[np.float32] | None], grid: tuple[int, int, int], stride: int
) -> list[float | NDArray[np.float32]]:
    """The weight of each control's residuals: numbers, or arrays [T, H, W] over the patches where there are masks.

    Where weights, masked, sum to more than 1 they are scaled to that sum. grid: latent frames, rows and columns of
    patches. stride: frames a latent frame; the first latent frame is one frame. A patch has the mean of its pixels.
    """
    if all(mask is None for mask in masks):
        total = max(1.0, sum(weights))
        return [weight / total for weight in weights]
    latent_frames, rows, columns = grid
    maps: list[NDArray[np.float32]] = []
    for weight, mask in zip(weights, masks, strict=True):
        if mask is None:
            maps.append(np.full(grid, weight, dtype=np.float32))
            continue
        height, width = mask.shape[1:]
        patches = mask.reshape(len(mask), rows, height // rows, columns, width // columns).mean((2, 4))
        spans = [(0, 1), *((1 + i * stride, 1 + (i + 1) * stride) for i in range(latent_frames - 1))]
        maps.append(weight * np.stack([patches[begin:end].mean(0) for begin, end in spans]))
    total_THW = np.maximum(1.0, np.sum(maps, 0))
    return [np.asarray(one / total_THW, dtype=np.float32) for one in maps]


def write_side_by_side(request: Request, video: Path) -> None:
    """Write hints, input and result to `side_by_side/<name>.mp4`.

    The hints, and the input as the model saw it, stay in `controls/<name>-<kind>.mp4` and `controls/<name>-input.mp4`.
    """
    parts: dict[str, Callable[[int, int], Frames]] = {
        control.kind: functools.partial(hint_frames, request, control) for control in request.controls
    }
    if request.source is not None:
        parts["input"] = functools.partial(_frames, request.source, request)
    cells, fps = [], fps_of(request)
    for label, frames in parts.items():
        path = video.parent / "controls" / f"{request.name}-{label}.mp4"
        path.parent.mkdir(exist_ok=True)
        with video_writer(path, fps) as write:
            for start in range(0, request.num_frames, _PIECE):
                write(frames(start, min(_PIECE, request.num_frames - start)))
        cells.append((label, path))
    cells.append((request.name, video))
    path = side_by_side_path(video)
    path.parent.mkdir(exist_ok=True)
    write_grid(path, cells, fps, together=len(cells))


def side_by_side_path(video: Path) -> Path:
    """Where the video beside its hints and input lies."""
    return video.parent / "side_by_side" / video.name


def _first(request: Request) -> Path:
    path = request.source or request.controls[0].path
    assert path is not None
    return path


def _frames(path: Path, request: Request, start: int, count: int, *, nearest: bool = False) -> Frames:
    """Frames of a video from frame `start` on, at the request's size; the last is repeated past its end."""
    frames = [_resized(frame, request, nearest) for frame in islice(iterate_frames(path), start, start + count)]
    return np.stack(frames + [frames[-1]] * (count - len(frames)))


def _resized(frame_HWC: Frames, request: Request, nearest: bool) -> Frames:
    """Stretched, as frames are for training; smooth pictures bilinear, and by area where they shrink."""
    size = (request.width, request.height)
    if frame_HWC.shape[1::-1] == size:
        return frame_HWC
    if nearest:
        return cv2.resize(frame_HWC, size, interpolation=cv2.INTER_NEAREST)
    shrinks = frame_HWC.shape[1] > request.width
    return cv2.resize(frame_HWC, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
