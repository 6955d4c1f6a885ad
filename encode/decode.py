"""Frames of a window, exactly the planned ones, as uint8 RGB.

The decoder seeks to the keyframe before the first frame, decodes no further than the last, and takes each frame by
its presentation time. Pictures are turned as the metadata says and stretched to the size asked for in the one pass
that makes them RGB, or fitted and padded by reflection. Colours are converted by the matrix and range the file states;
YUV that states none is BT.601, which is what FFmpeg writes unlabelled. 10 and 12 bits become 8; HDR is not tone-mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from encode.files import VideoFile, parse_location
from encode.probe import (
    DecodeError,
    FrameIndex,
    Orientation,
    VideoInfo,
    frame_index,
    open_video,
    orientation,
    probe,
)
from encode.windows import target_frames
from manifests.hints import HintKind, make_hint
from manifests.padding import content_box, reflect

__all__ = ["PIXEL_POLICY", "DecodeError", "DecodeJob", "VideoInfo", "decode_window", "probe"]

PIXEL_POLICY = "stretch-bilinear-bitexact-untagged601/1"
"""Names how pixels are made, for fingerprints; changes whenever the same file would give other pixels."""

PAD_POLICY = "fit-bicubic-reflect-bitexact-untagged601/1"
"""The same with `resize = "pad"`."""

# BITEXACT and ACCURATE_RND give the same bytes on every CPU; the last one keeps the chroma sharp.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
_SCALING = {
    "bilinear": Interpolation.BILINEAR | _EXACT,
    "bicubic": Interpolation.BICUBIC | _EXACT,
    "nearest": Interpolation.POINT | _EXACT,
}
_UNSPECIFIED = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeJob:
    """One window of one video, at one size.

    path: the video, or its location as text.
    first: target frame the window begins with, as `encode.windows.plan_windows` gives it.
    num_frames: target frames. fps: target frames a second, None for the source's own frames.
    height, width: pixels. start, end: the part of the video the target frames were counted in, seconds.
    resize: `stretch` the picture, or fit it and `pad` with its reflection. interpolation: `bilinear`, `bicubic` or
    `nearest`. box: where the picture goes (top, left, height, width); None says `resize`. hints: kind and parameters of
    the hints to compute of the window, which come one after the other instead of it. patience: how much longer than
    usual it may take.
    """

    path: str | VideoFile
    first: int
    num_frames: int
    fps: float | None
    height: int
    width: int
    start: float | None = None
    end: float | None = None
    resize: Literal["stretch", "pad"] = "stretch"
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    box: tuple[int, int, int, int] | None = None
    hints: tuple[tuple[HintKind, dict[str, Any]], ...] = ()
    patience: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[num_frames, height, width, 3]; with hints so many times num_frames."""
        return (max(1, len(self.hints)) * self.num_frames, self.height, self.width, 3)


def decode_window(job: DecodeJob, out: npt.NDArray[np.uint8] | None = None, threads: int = 1) -> npt.NDArray[np.uint8]:
    """The frames of a window, or its hints, uint8 RGB of `job.shape`, values 0 to 255.

    out: an array of that shape to write into instead of a new one. threads: decoder threads.
    Raises DecodeError when the file cannot be read, holds fewer frames than the window needs, or one of them is
    damaged; `out` is then partly written.
    """
    path = parse_location(job.path)
    index = frame_index(path)
    available = target_frames(index.times, job.fps, job.start, job.end)
    wanted = available[job.first : job.first + job.num_frames]
    if len(wanted) < job.num_frames:
        raise DecodeError(
            f"{path}: the window is frames {job.first} to {job.first + job.num_frames - 1}, "
            f"the video has {len(available)}"
        )
    if out is None:
        out = np.empty(job.shape, dtype=np.uint8)
    if out.shape != job.shape or out.dtype != np.uint8:
        raise ValueError(f"out is {out.dtype} {out.shape}, not uint8 {job.shape}")
    rows_of: dict[int, list[int]] = {}
    for row, frame in enumerate(wanted):
        rows_of.setdefault(int(index.pts[frame]), []).append(row)

    for seek_to in _seek_times(index, min(rows_of)):
        if _decode_from(path, index, seek_to, rows_of, out, threads, job):
            for row in range(job.num_frames if job.hints else 0):
                frame = out[row].copy()
                for number, hint in enumerate(job.hints):
                    out[number * job.num_frames + row] = make_hint(*hint, frame)
            return out
    raise DecodeError(f"{path}: the frame at {_seconds(index, min(rows_of))} cannot be decoded")


def _seek_times(index: FrameIndex, first_pts: int) -> Iterator[int | None]:
    """Where to seek for a frame, the cheapest first; None is the beginning of the file.

    Demuxers disagree on whether they seek by the time of presentation or of decoding, so a seek may land past the
    keyframe; and a keyframe may not stand alone. The caller sees that in the first frame that comes out.
    """
    before = index.keyframes[index.keyframes[:, 0] <= first_pts]
    if len(before):
        yield int(before[-1, 0])
    back = 1
    while back <= len(before):
        yield int(before[-back, 1])
        back *= 2
    yield None


def _decode_from(
    path: VideoFile,
    index: FrameIndex,
    seek_to: int | None,
    rows_of: dict[int, list[int]],
    out: npt.NDArray[np.uint8],
    threads: int,
    job: DecodeJob,
) -> bool:
    """Fills `out`; False when decoding from there yields nothing at or before the first frame wanted."""
    missing = sorted(rows_of, reverse=True)
    reformatter = VideoReformatter()
    landed = False
    with open_video(path, threads) as (container, stream):
        if seek_to is not None:
            container.seek(seek_to, stream=stream, backward=True)
        for pts, frame in _decoded(container, stream, index, rows_of.keys()):
            if pts > missing[-1]:
                if not landed:
                    return False
                raise DecodeError(f"{path}: the frame at {_seconds(index, missing[-1])} cannot be decoded")
            landed = True
            if pts < missing[-1]:
                continue
            if frame.is_corrupt:
                raise DecodeError(f"{path}: the frame at {_seconds(index, pts)} is damaged")
            rows = rows_of[missing.pop()]
            _write(frame, orientation(path, frame), reformatter, out[rows[0]], job)
            out[rows[1:]] = out[rows[0]]
            if not missing:
                return True
    if not landed:
        return False
    raise DecodeError(f"{path}: ends before the frame at {_seconds(index, missing[-1])}")


def _decoded(container: Any, stream: Any, index: FrameIndex, wanted: Set[int]) -> Iterator[tuple[int, Any]]:
    """(presentation time, frame) in order of presentation, from where the container stands.

    Feeds no packet after the last wanted one: packets are in the order of decoding, so those before it hold all it
    refers to. Of H.264, which marks them reliably, unwanted pictures that no other refers to are not decoded.
    """
    if index.by_count:
        yield from enumerate(container.decode(stream))
        return
    context = stream.codec_context
    to_send = set(wanted)
    for packet in container.demux(stream):
        if context.name == "h264":
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        frames = packet.decode()
        to_send.discard(packet.pts)
        if not to_send and packet.size:
            frames += context.decode(None)
        yield from ((frame.pts, frame) for frame in frames)
        if not to_send:
            return


def _write(
    frame: Any, turn: Orientation, reformatter: VideoReformatter, picture: npt.NDArray[np.uint8], job: DecodeJob
) -> None:
    """One decoded frame into one [height, width, 3] of the output."""
    box = job.box or (0, 0, job.height, job.width)
    if job.box is None and job.resize == "pad":
        shown = (frame.width, frame.height) if turn.transpose else (frame.height, frame.width)
        box = content_box(*shown, job.height, job.width)
    top, left, inner_height, inner_width = box
    _write_box(frame, turn, reformatter, picture[top : top + inner_height, left : left + inner_width], job)
    reflect(picture, box)


def _write_box(
    frame: Any, turn: Orientation, reformatter: VideoReformatter, out: npt.NDArray[np.uint8], job: DecodeJob
) -> None:
    height, width = out.shape[1::-1] if turn.transpose else out.shape[:2]
    unlabelled = frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb
    rgb = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=Colorspace.ITU601 if unlabelled else None,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALING[job.interpolation],
        threads=1,
    )
    plane = rgb.planes[0]
    lines = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
    picture = lines[:height, : 3 * width].reshape(height, width, 3)
    if turn.transpose:
        picture = picture.transpose(1, 0, 2)
    out[...] = picture[:: -1 if turn.flip_rows else 1, :: -1 if turn.flip_columns else 1]


def _seconds(index: FrameIndex, pts: int) -> str:
    return f"{float((pts - int(index.pts[0])) * index.time_base):.3f} s"
