"""What a video file is, found by reading its packets rather than by trusting its header.

Files are untrusted: only regular files in a known container format are opened, nothing they refer to is, and
their sizes are bounded. A `.png`, `.jpg` or `.jpeg` is a video of one frame. Call it in a killable process
(`encode.pool`) for files of unknown origin.
"""

from __future__ import annotations

import functools
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from encode.files import VideoFile, ffmpeg_url, file_of, head_of, name_of, state_of
from manifests.errors import LatentlineError

MAX_PIXELS = 8192 * 8192
MAX_FRAMES = 5_000_000
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,ivf"
_OPTIONS = {"protocol_whitelist": "file,subfile", "max_pixels": str(MAX_PIXELS)}
_PICTURES = {".png": "png_pipe", ".jpg": "jpeg_pipe", ".jpeg": "jpeg_pipe"}
# Share of a mean frame that a frame of a steady rate may be off; 60 fps rounded to milliseconds stays within it.
_STEADY = 0.1


class DecodeError(LatentlineError):
    """A video file that cannot be read; one line that names it."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a decoded picture becomes the displayed one: transpose first, then flip rows, then flip columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def degrees_clockwise(self) -> int:
        """0, 90, 180 or 270; the mirroring of a mirrored picture is left out."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows and self.flip_columns else 0


_EXIF = {
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """A video as it is presented.

    num_frames: presented frames. fps: their mean rate, such that the last one is at (num_frames - 1) / fps.
    duration: seconds, the last frame's own time included.
    width, height: pixels after rotation. rotation: degrees clockwise the metadata asks for (0, 90, 180, 270).
    variable_frame_rate: some frame is not where a steady `fps` would put it.
    frame_times: float64 [num_frames], seconds from the first frame, ascending.
    """

    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    codec: str
    variable_frame_rate: bool
    frame_times: npt.NDArray[np.float64] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class FrameIndex:
    """Where the frames are.

    pts: int64 [num_frames], presentation time of each presented frame in `time_base`, ascending.
    keyframes: int64 [num_keyframes, 2], presentation time and seek time of each keyframe, ascending.
    by_count: the file has no usable timestamps: `pts` counts frames in decoded order and seeking is not possible.
    """

    pts: npt.NDArray[np.int64]
    keyframes: npt.NDArray[np.int64]
    time_base: Fraction
    by_count: bool
    rate: float
    codec: str
    coded_width: int
    coded_height: int
    orientation: Orientation

    @property
    def times(self) -> npt.NDArray[np.float64]:
        return (self.pts - self.pts[0]).astype(np.float64) * float(self.time_base)


def probe(path: VideoFile) -> VideoInfo:
    """Counts the frames of a video and decodes the first one.

    Raises DecodeError when the file is missing, empty, truncated, no video file, a playlist, without a video
    stream, too large, or its first frame cannot be decoded.
    """
    index = frame_index(path)
    times = index.times
    mean = float(times[-1]) / (len(times) - 1) if len(times) > 1 else 1 / index.rate
    off = np.abs(times - np.arange(len(times)) * mean).max()
    turned = index.orientation.transpose
    return VideoInfo(
        num_frames=len(times),
        fps=1 / mean,
        duration=float(times[-1]) + mean,
        width=index.coded_height if turned else index.coded_width,
        height=index.coded_width if turned else index.coded_height,
        rotation=index.orientation.degrees_clockwise,
        codec=index.codec,
        variable_frame_rate=bool(off > _STEADY * mean),
        frame_times=times,
    )


def frame_index(path: VideoFile) -> FrameIndex:
    """The frames of a video; remembered for the last few files, for as long as they do not change."""
    try:
        state = state_of(path)
    except OSError as error:
        raise DecodeError(f"{path}: cannot be read: {error.strerror}") from error
    return _frame_index(path, state.size, state.modified_ns)


@functools.lru_cache(maxsize=8)
def _frame_index(path: VideoFile, size: int, mtime_ns: int) -> FrameIndex:
    with open_video(path) as (container, stream):
        first, pts, keyframes, num_packets, end, usable = _scan(path, container, stream)
        if first is None:
            raise DecodeError(f"{path}: no frame can be decoded")
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 1.0
        _refuse_truncated(path, container, stream, num_packets, end)
        time_base = stream.time_base
        coded = (stream.codec_context.codec.canonical_name, first.width, first.height, orientation(path, first))
    if not usable:
        count = _count_by_decoding(path)
        pts, keyframes, time_base = list(range(count)), [], 1 / Fraction(rate).limit_denominator(100_000)
    return FrameIndex(
        np.sort(np.array(pts, dtype=np.int64)),
        np.array(sorted(keyframes), dtype=np.int64).reshape(-1, 2),
        time_base,
        not usable,
        rate,
        *coded,
    )


def _scan(path: VideoFile, container: Any, stream: Any) -> tuple[Any, list[int], list[tuple[int, int]], int, int, bool]:
    """(first frame, pts of presented frames, keyframes, packets seen, end of the last, whether the pts can be used)."""
    first, end = None, 0
    pts: list[int] = []
    keyframes: list[tuple[int, int]] = []
    num_packets = 0
    usable = container.format.name != "avi"  # its packets carry decoding times only
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size == 0:
            continue
        num_packets += 1
        if num_packets > MAX_FRAMES:
            raise DecodeError(f"{path}: more than {MAX_FRAMES} frames")
        if packet.is_corrupt:
            raise DecodeError(f"{path}: truncated or damaged at packet {num_packets}")
        if packet.is_discard or (stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10):
            continue
        if packet.pts is None:
            usable = False
            continue
        pts.append(packet.pts)
        end = max(end, packet.pts + (packet.duration or 0))
        if packet.is_keyframe:
            keyframes.append((packet.pts, packet.pts if packet.dts is None else min(packet.dts, packet.pts)))
    return first, pts, keyframes, num_packets, end, usable and len(set(pts)) == len(pts)


def _refuse_truncated(path: VideoFile, container: Any, stream: Any, num_packets: int, end: int) -> None:
    if stream.frames > num_packets:
        raise DecodeError(f"{path}: truncated: {num_packets} of {stream.frames} frames are there")
    promised = _duration_tag(stream)
    if promised is None and len(container.streams) == 1 and container.duration:
        promised = container.duration / av.time_base
    found = end * float(stream.time_base)
    if promised is not None and promised - found > max(0.5, 0.02 * promised):
        raise DecodeError(f"{path}: truncated: {found:.2f} of {promised:.2f} seconds are there")


def _duration_tag(stream: Any) -> float | None:
    """Seconds a Matroska file states for the stream itself, as `HH:MM:SS.nnnnnnnnn`."""
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def _count_by_decoding(path: VideoFile) -> int:
    with open_video(path) as (container, stream):
        return sum(1 for _ in container.decode(stream))


@contextmanager
def open_video(path: VideoFile, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """(PyAV container, its video stream) of a regular file; every FFmpeg failure inside is a DecodeError."""
    _refuse_odd_files(path)
    picture = _picture_format(path)
    options = {"format_whitelist": picture or _FORMATS, **_OPTIONS}
    try:
        with av.open(ffmpeg_url(path), format=picture, options=options, metadata_errors="replace") as container:
            streams = [
                stream
                for stream in container.streams.video
                if not stream.disposition & av.stream.Disposition.attached_pic
            ]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams})
                raise DecodeError(f"{path}: no video stream, only {', '.join(kinds) or 'nothing'}")
            stream = streams[0]
            if stream.codec_context is None:
                raise DecodeError(f"{path}: a codec this FFmpeg has no decoder for")
            if not 0 < stream.width * stream.height <= MAX_PIXELS:  # FFmpeg takes 0 for a size over its limit
                raise DecodeError(f"{path}: no picture size, or one over {MAX_PIXELS} pixels")
            stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
            stream.thread_count = threads
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.MemoryError as error:
        raise MemoryError from error
    except av.error.FFmpegError as error:
        raise DecodeError(f"{path}: not a readable video: {error.strerror}") from error


def _refuse_odd_files(path: VideoFile) -> None:
    try:
        if not stat.S_ISREG(os.stat(file_of(path)).st_mode):
            raise DecodeError(f"{path}: not a regular file")
        head = head_of(path, 64)
    except OSError as error:
        raise DecodeError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        raise DecodeError(f"{path}: empty (0 bytes)")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD")):
        raise DecodeError(f"{path}: a playlist, not a video file")


def orientation(path: VideoFile, frame: Any) -> Orientation:
    """From the frame's display matrix, or a picture's EXIF.

    DecodeError when it turns by other than a multiple of 90 degrees.
    """
    if _picture_format(path):
        return _exif_orientation(path)
    if "DISPLAYMATRIX" not in {data.type.name for data in frame.side_data}:
        return Orientation()
    matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), dtype=np.int32)
    a, b, c, d = (int(matrix[i]) / 65536 for i in (0, 1, 3, 4))
    if abs(b) < 0.01 and abs(c) < 0.01:
        return Orientation(False, d < 0, a < 0)
    if abs(a) < 0.01 and abs(d) < 0.01:
        return Orientation(True, b < 0, c < 0)
    raise DecodeError(f"{path}: its metadata rotates it by {frame.rotation} degrees, not by a multiple of 90")


def _picture_format(path: VideoFile) -> str | None:
    """FFmpeg's name of the format, by the file's suffix; None for what is no picture."""
    return _PICTURES.get(Path(name_of(path)).suffix.lower())


def _exif_orientation(path: VideoFile) -> Orientation:
    """PyAV cannot list the side data of a frame that has EXIF, so Pillow reads it."""
    try:
        with Image.open(io.BytesIO(head_of(path, state_of(path).size))) as picture:
            number = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except OSError as error:
        raise DecodeError(f"{path}: not a readable picture: {error}") from error
    return _EXIF.get(number, Orientation())
