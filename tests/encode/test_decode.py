from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.decode import DecodeJob, decode_window, probe
from encode.windows import target_frames
from tests.encode.video_files import B_FRAMES, NUM_FRAMES, numbers_of, write_video
from tests.encode.windows import error_of, window

QUIET_265 = "log-level=none:"

# Long groups of pictures, B-frames that refer to B-frames, groups that borrow from the one before, pictures that
# are decoded and never shown, containers with and without presentation times.
FILES: dict[str, dict] = {
    "h264-b-frames.mp4": B_FRAMES,
    "h264-open-gop.mp4": {"options": {"bf": "3", "g": "20", "x264-params": "open-gop=1:scenecut=0"}},
    "h264-one-keyframe.mp4": {"options": {"bf": "2", "g": "1000", "x264-params": "scenecut=0"}},
    "h264-intra-refresh.mp4": {"options": {"g": "20", "x264-params": "intra-refresh=1"}},
    "h264-tiny-gop.mp4": {"options": {"bf": "2", "g": "2"}},
    "h264.mkv": {"options": {"bf": "3", "g": "50"}},
    "h264.mov": {"options": {"bf": "3", "g": "50"}},
    "h264.ts": {"options": {"bf": "3", "g": "25"}},
    "h264.avi": {"options": {"bf": "3", "g": "25"}},
    "h264-10bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264-odd.mp4": {"pix_fmt": "yuv444p", "height": 63, "width": 127},
    "h265.mp4": {
        "codec": "libx265",
        "options": {"x265-params": QUIET_265 + "keyint=40:bframes=4:open-gop=1"},
    },
    "h265-10bit.mp4": {
        "codec": "libx265",
        "pix_fmt": "yuv420p10le",
        "options": {"x265-params": QUIET_265 + "keyint=30"},
    },
    "vp8-hidden-frames.webm": {
        "codec": "libvpx",
        "options": {"g": "40", "auto-alt-ref": "1", "lag-in-frames": "16"},
    },
    "vp9-hidden-frames.webm": {
        "codec": "libvpx-vp9",
        "options": {
            "g": "40",
            "auto-alt-ref": "1",
            "lag-in-frames": "16",
            "deadline": "realtime",
            "cpu-used": "8",
        },
    },
    "vp9-odd.webm": {
        "codec": "libvpx-vp9",
        "height": 63,
        "width": 127,
        "options": {"deadline": "realtime", "cpu-used": "8"},
    },
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "g": "40"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "20"}},
}


def has_encoder(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module", params=FILES)
def numbered(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A video of 120 numbered frames at 30 fps."""
    settings = FILES[request.param]
    if not has_encoder(settings.get("codec", "libx264")):
        pytest.skip(f"this FFmpeg cannot write {settings['codec']}")
    return write_video(folder / request.param, NUM_FRAMES, **settings)


def test_probe_counts_the_presented_frames(numbered: Path) -> None:
    info = probe(numbered)
    odd = "odd" in numbered.name
    assert info.num_frames == NUM_FRAMES == len(info.frame_times)
    assert info.fps == pytest.approx(30, rel=1e-3)
    assert info.duration == pytest.approx(4, rel=1e-3)
    assert (info.height, info.width) == ((63, 127) if odd else (64, 128))
    assert info.rotation == 0
    assert info.codec == {"h265": "hevc"}.get(numbered.stem.split("-")[0], numbered.stem.split("-")[0])
    assert not info.variable_frame_rate
    assert info.frame_times[0] == 0
    assert (np.diff(info.frame_times) > 0).all()


@pytest.mark.parametrize("first", [0, 1, 19, 20, 37, 59, 60, 61, 110])
def test_windows_hold_exactly_their_frames(numbered: Path, first: int) -> None:
    frames = window(numbered, first, 10)
    assert frames.shape == (10, 32, 64, 3)
    assert frames.dtype == np.uint8
    assert numbers_of(frames) == list(range(first, first + 10))


def test_frames_of_another_rate_are_the_nearest_ones(numbered: Path) -> None:
    for first in (0, 30):
        nearest = [min(range(NUM_FRAMES), key=lambda i, t=t: abs(i / 30 - t / 16)) for t in range(first, first + 20)]
        assert numbers_of(window(numbered, first, 20, 16.0)) == nearest
    assert numbers_of(window(numbered, 6, 6, 60.0)) == [3, 3, 4, 4, 5, 5]


@settings(max_examples=30)
@given(first=st.integers(0, 40), num_frames=st.integers(1, 20), fps=st.sampled_from([None, 7.0, 16.0, 24.0]))
def test_a_window_has_the_pixels_of_a_whole_decode(b_frames: Path, first: int, num_frames: int, fps: float) -> None:
    whole = window(b_frames, 0, NUM_FRAMES)
    chosen = target_frames(probe(b_frames).frame_times, fps)[first : first + num_frames]
    if len(chosen) == num_frames:
        np.testing.assert_array_equal(window(b_frames, first, num_frames, fps), whole[chosen])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rates_are_followed(tmp_path: Path, suffix: str) -> None:
    times_ms = [0, 20, 40, 60, 500, 1000, 1010, 1020, 1500, 1530, 2000]
    options = {"bf": "2", "g": "5"}
    path = write_video(tmp_path / f"vfr.{suffix}", len(times_ms), times_ms=times_ms, options=options)
    info = probe(path)
    assert info.variable_frame_rate
    np.testing.assert_allclose(info.frame_times * 1000, times_ms, atol=0.6)
    assert numbers_of(window(path, 0, 8, 4.0)) == [0, 3, 4, 4, 5, 7, 8, 9]
    assert numbers_of(window(path, 2, 5)) == [2, 3, 4, 5, 6]


def test_a_part_of_a_video_is_counted_from_its_start(b_frames: Path) -> None:
    assert numbers_of(window(b_frames, 2, 5, start=1.0, end=2.0)) == [32, 33, 34, 35, 36]
    assert numbers_of(window(b_frames, 1, 3, 10.0, start=1.0, end=2.0)) == [33, 36, 39]
    assert "the video has 30" in error_of(b_frames, first=25, num_frames=10, start=1.0, end=2.0)


def test_times_count_from_the_first_presented_frame(tmp_path: Path) -> None:
    times_ms = [5000 + 40 * i for i in range(50)]
    path = write_video(tmp_path / "late.mkv", 50, fps=25, times_ms=times_ms)
    assert probe(path).frame_times[0] == 0
    assert numbers_of(window(path, 25, 5, 25.0)) == [25, 26, 27, 28, 29]


def test_an_exact_clip_is_one_window_and_one_frame_more_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "exact.mp4", 29, fps=16)
    assert numbers_of(window(path, 0, 29, 16.0)) == list(range(29))
    assert "the video has 29" in error_of(path, first=0, num_frames=30, fps=16.0)
    assert "the video has 29" in error_of(path, first=0, num_frames=30)
    one = write_video(tmp_path / "one.mp4", 1, fps=16)
    assert numbers_of(window(one, 0, 1, 16.0)) == [0]
    assert probe(one).fps == pytest.approx(16)


# Corners of the picture as stored: red top left, green top right, blue bottom left, white bottom right.
CORNERS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


def corners_of(frame: np.ndarray) -> str:
    height, width = frame.shape[:2]
    spots = [frame[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(min(CORNERS, key=lambda name: np.abs(np.subtract(CORNERS[name], s)).sum()) for s in spots)


@pytest.mark.parametrize(
    ("counterclockwise", "mirror", "degrees", "expected"),
    [
        (0, False, 0, "RGBW"),
        (90, False, 270, "GWRB"),
        (180, False, 180, "WBGR"),
        (-90, False, 90, "BRWG"),
        (0, True, 0, "GRWB"),
        (90, True, 90, "WGBR"),
    ],
)
def test_metadata_turns_the_picture(
    tmp_path: Path, counterclockwise: int, mirror: bool, degrees: int, expected: str
) -> None:
    picture = np.zeros((64, 128, 3), dtype=np.uint8)
    picture[:32, :64], picture[:32, 64:], picture[32:, :64], picture[32:, 64:] = CORNERS.values()
    pictures = [picture] * 3
    path = write_video(tmp_path / "t.mp4", 3, pictures=pictures, rotate=counterclockwise, mirror=mirror)
    info = probe(path)
    turned = counterclockwise in (90, -90)
    assert (info.height, info.width) == ((128, 64) if turned else (64, 128))
    frames = window(path, 0, 3, height=info.height, width=info.width)
    assert info.rotation == degrees
    assert corners_of(frames[2]) == expected


COLOURS = [(200, 40, 60), (30, 180, 70), (50, 60, 210), (128, 128, 128), (250, 250, 250), (5, 5, 5)]


@pytest.mark.parametrize(
    ("matrix", "full_range", "pix_fmt"),
    [
        (None, False, "yuv420p"),
        ("bt709", False, "yuv420p"),
        ("smpte170m", False, "yuv420p"),
        ("bt709", True, "yuv420p"),
        ("bt709", False, "yuv420p10le"),
        ("bt2020nc", False, "yuv420p10le"),
    ],
)
def test_colours_follow_the_stated_matrix_and_range(
    tmp_path: Path, matrix: str | None, full_range: bool, pix_fmt: str
) -> None:
    """The YUV is computed here from the definition of each matrix, not by the library under test."""
    red, blue = {"bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593)}.get(matrix or "", (0.299, 0.114))
    path = tmp_path / "colours.mp4"
    bits = 10 if "10" in pix_fmt else 8
    with av.open(str(path), "w") as container:
        params = f"qp=1:fullrange={'on' if full_range else 'off'}" + (f":colormatrix={matrix}" if matrix else "")
        stream = container.add_stream("libx264", rate=25, options={"x264-params": params})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        for i, rgb in enumerate(COLOURS):
            r, g, b = (value / 255 for value in rgb)
            y = red * r + (1 - red - blue) * g + blue * b
            planes = [y, (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)]
            frame = av.VideoFrame(64, 64, pix_fmt)
            for plane, value, chroma in zip(frame.planes, planes, (False, True, True), strict=True):
                if full_range:
                    code = (value + 0.5 * chroma) * 255
                else:
                    code = 128 + 224 * value if chroma else 16 + 219 * value
                scaled = round(code * 2 ** (bits - 8))
                dtype = np.uint16 if bits == 10 else np.uint8
                plane.update(np.full(plane.buffer_size // dtype().itemsize, scaled, dtype=dtype).tobytes())
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = window(path, 0, len(COLOURS), height=16, width=16)
    for frame, colour in zip(frames, COLOURS, strict=True):
        np.testing.assert_allclose(frame.reshape(-1, 3).astype(int), [colour] * 256, atol=4)


def test_resizing_stretches_the_whole_picture(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(20, 230, 256)[None, :, None], (64, 256, 3)).astype(np.uint8)
    path = write_video(tmp_path / "ramp.mp4", 2, pictures=[ramp] * 2, height=64, width=256, options={"qp": "4"})
    for height, width in ((64, 256), (96, 160), (32, 512)):
        frames = window(path, 0, 2, height=height, width=width).astype(float)
        expected = np.interp((np.arange(width) + 0.5) / width * 256 - 0.5, np.arange(256), ramp[0, :, 0])
        np.testing.assert_allclose(frames.mean(axis=(0, 1, 3))[2:-2], expected[2:-2], atol=2.5)
        assert frames.std(axis=1).max() < 3


def test_frames_are_written_where_told(b_frames: Path) -> None:
    job = DecodeJob(path=str(b_frames), first=3, num_frames=2, fps=None, height=16, width=32)
    out = np.zeros((2, 16, 32, 3), dtype=np.uint8)
    assert decode_window(job, out) is out
    np.testing.assert_array_equal(out, decode_window(job, threads=4))
    with pytest.raises(ValueError, match="out is"):
        decode_window(job, out[:1])
