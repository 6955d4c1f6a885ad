"""Video files in and out: H.264 MP4 through PyAV, contact sheets through Pillow.

Files appear complete or not at all: each is written under a temporary name beside the target, then renamed.
Frames are uint8 RGB, [T, H, W, 3], 0..255.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from manifests.errors import LatentlineError

Frames: TypeAlias = NDArray[np.uint8]

BT709 = 1
"""The code of ITU-R BT.709 for colour primaries and transfer in ISO/IEC 23091-2."""

X264_OPTIONS = {"preset": "medium", "threads": "4", "x264-params": "mbtree=0"}
"""The same frames give the same bytes: x264's output depends on its thread count, and its macroblock tree
was seen to differ between calls on equal frames."""


def write_mp4(path: Path, frames_THWC: Frames, fps: float, *, crf: int = 16, comment: str | None = None) -> None:
    """Write frames as one video; see `video_writer`. Raises LatentlineError where there are none, too."""
    with video_writer(path, fps, crf=crf, comment=comment) as write:
        write(frames_THWC)


@contextmanager
def video_writer(
    path: Path, fps: float, *, crf: int = 16, comment: str | None = None
) -> Iterator[Callable[[Frames], None]]:
    """A function that appends frames to a new H.264 MP4, yuv420p, BT.709, limited range; there at the end, whole.

    fps: frames a second, rounded to a thousandth. crf: x264's constant rate factor, 0 (best) to 51. comment: text
    in the file's metadata. yuv420p halves both sides of the colour planes, so H and W must be even.
    Raises LatentlineError on another shape or type, if nothing was appended, or if the file cannot be written.
    """
    with _written_whole(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf), **X264_OPTIONS}
        context = stream.codec_context
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = BT709
        size: tuple[int, ...] | None = None

        def write(frames_THWC: Frames) -> None:
            nonlocal size
            _check_frames(path, frames_THWC)
            if size not in (None, frames_THWC.shape[1:]):
                raise LatentlineError(f"{path}: frames of {frames_THWC.shape[1:]} in a video of {size}")
            if size is None:
                size = frames_THWC.shape[1:]
                stream.height, stream.width = size[:2]
            for frame_HWC in frames_THWC:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
                yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
                container.mux(stream.encode(yuv))

        yield write
        if size is None:
            raise LatentlineError(f"{path}: no frames to write")
        container.mux(stream.encode())


def _check_frames(path: Path, frames_THWC: Frames) -> None:
    if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8:
        found = f"{frames_THWC.dtype} {list(frames_THWC.shape)}"
        raise LatentlineError(f"{path}: frames must be uint8 [T, H, W, 3], these are {found}")
    num_frames, height, width, _ = frames_THWC.shape
    if num_frames == 0:
        raise LatentlineError(f"{path}: no frames to write")
    if height % 2 or width % 2:
        raise LatentlineError(f"{path}: H.264 yuv420p needs an even height and width, not {height} x {width}")


def read_frames(path: Path, *, last: int | None = None) -> Frames:
    """Frames of the file's first video stream, in display order: all, or the `last` ones (all if fewer).

    Raises LatentlineError if there is no such file or it cannot be decoded.
    """
    return np.stack(deque(iterate_frames(path), maxlen=last))


def iterate_frames(path: Path) -> Iterator[Frames]:
    """Frames [H, W, 3] of the file's first video stream, in display order, one at a time; errors as `read_frames`."""
    found = False
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                found = True
                yield frame.to_ndarray(format="rgb24")
    except (OSError, IndexError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or "it has no video stream"
        raise LatentlineError(f"{path}: cannot read this video: {reason}") from error
    if not found:
        raise LatentlineError(f"{path}: cannot read this video: no frame could be decoded")


def spread_frames(frames_THWC: Frames, count: int) -> Frames:
    """At most `count` frames, evenly spaced, the first and the last included."""
    chosen = np.linspace(0, len(frames_THWC) - 1, min(count, len(frames_THWC))).round().astype(int)
    return frames_THWC[chosen]


def read_spread(path: Path, count: int) -> Frames:
    """`spread_frames` of a video, holding no more of it than those frames."""
    total = sum(1 for _ in iterate_frames(path))
    wanted = {int(index) for index in np.linspace(0, total - 1, min(count, total)).round()}
    return np.stack([frame for index, frame in enumerate(iterate_frames(path)) if index in wanted])


def contact_sheet(path: Path, rows: Sequence[tuple[str, Frames]], *, columns: int = 6, cell_width: int = 240) -> None:
    """Write a PNG with one row a video: its label, then `columns` evenly spaced frames.

    rows: (label, frames); sizes may differ. cell_width: pixels a frame is shrunk to; never enlarged.
    Raises LatentlineError if there is nothing to show or the file cannot be written.
    """
    if not rows:
        raise LatentlineError(f"{path}: no videos to show in a contact sheet")
    gap, label_height = 4, 20
    font = ImageFont.load_default(size=13)
    strips = [(label, [_thumbnail(f, cell_width) for f in spread_frames(frames, columns)]) for label, frames in rows]
    sheet_width = max(sum(image.width + gap for image in images) for _, images in strips) + gap
    sheet_height = sum(label_height + images[0].height + gap for _, images in strips) + gap
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for label, images in strips:
        draw.text((gap, top + 3), shorten(label, font, sheet_width - 2 * gap), fill="black", font=font)
        top += label_height
        for column, image in enumerate(images):
            sheet.paste(image, (gap + column * (image.width + gap), top))
        top += images[0].height + gap
    with _written_whole(path) as temporary:
        sheet.save(temporary, format="PNG")


def _thumbnail(frame_HWC: Frames, width: int) -> Image.Image:
    image = Image.fromarray(frame_HWC)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BOX)
    return image


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text on one line, cut to `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    fits = bisect_right(range(len(text)), width, key=lambda count: math.ceil(font.getlength(text[:count] + "...")))
    return text[: max(0, fits - 1)] + "..."


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it on success and removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LatentlineError(f"{path}: cannot write this file: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
