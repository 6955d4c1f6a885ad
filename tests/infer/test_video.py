import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.video import contact_sheet, read_frames, spread_frames, write_mp4
from manifests.errors import LatentlineError


def gradient_frames(num_frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth ramp of saturated colours whose brightness follows time."""
    x = np.linspace(0, 1, width)[None, :].repeat(height, 0)
    clip = [np.stack([x * 255, (1 - x) * 255, np.full_like(x, 40 * t)], -1) for t in range(num_frames)]
    return np.stack(clip).astype(np.uint8)


def test_frames_survive_a_round_trip(tmp_path: Path) -> None:
    frames = gradient_frames()
    write_mp4(tmp_path / "a.mp4", frames, 16.0)
    read = read_frames(tmp_path / "a.mp4")
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames.astype(int)).mean() < 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_last_frames_only(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", gradient_frames(), 16.0)
    np.testing.assert_array_equal(read_frames(tmp_path / "a.mp4", last=2), read_frames(tmp_path / "a.mp4")[-2:])


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 33, 32, 3), np.uint8), "even height and width, not 33 x 32"),
        (np.zeros((0, 32, 32, 3), np.uint8), "no frames"),
        (np.zeros((2, 32, 32, 3), np.float32), r"float32 \[2, 32, 32, 3\]"),
    ],
)
def test_bad_frames_are_refused_and_leave_no_file(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    with pytest.raises(LatentlineError, match=message):
        write_mp4(tmp_path / "a.mp4", frames, 16.0)
    assert not list(tmp_path.iterdir())


def test_an_existing_video_survives_a_failed_rewrite(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", gradient_frames(), 16.0)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(LatentlineError):
        write_mp4(tmp_path / "a.mp4", gradient_frames(height=31), 16.0)
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatentlineError, match=r"gone/a\.mp4: cannot write this file: No such file"):
        write_mp4(tmp_path / "gone" / "a.mp4", gradient_frames(), 16.0)


def test_unreadable_videos_are_named(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(os.urandom(2000))
    with pytest.raises(LatentlineError, match=r"noise\.mp4: cannot read this video"):
        read_frames(tmp_path / "noise.mp4")
    with pytest.raises(LatentlineError, match=r"none\.mp4: cannot read this video: No such file"):
        read_frames(tmp_path / "none.mp4")


def test_spread_takes_both_ends() -> None:
    frames = np.arange(93, dtype=np.uint8).reshape(93, 1, 1, 1)
    assert spread_frames(frames, 5).ravel().tolist() == [0, 23, 46, 69, 92]
    assert len(spread_frames(frames[:3], 5)) == 3


def test_contact_sheet_shows_each_video_in_a_row(tmp_path: Path) -> None:
    red = np.zeros((9, 32, 48, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    blue = np.zeros((1, 64, 480, 3), np.uint8) + np.array([0, 0, 255], np.uint8)
    contact_sheet(tmp_path / "sheet.png", [("first", red), ("second " * 200, blue)], columns=3)
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == [255, 0, 0]).all(-1).sum() == 3 * 32 * 48
    assert (pixels == [0, 0, 255]).all(-1).sum() == 32 * 240
    rows = np.nonzero((pixels == [255, 0, 0]).all(-1))[0].max(), np.nonzero((pixels == [0, 0, 255]).all(-1))[0].min()
    assert rows[0] < rows[1]


def test_a_contact_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LatentlineError, match="no videos"):
        contact_sheet(tmp_path / "sheet.png", [])
