"""Files that are damaged, no videos, or more than they seem: refused in one line with the reason."""

import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from encode.decode import probe
from tests.encode.video_files import NUM_FRAMES, numbers_of, write_audio, write_video
from tests.encode.windows import error_of, window


def test_a_slanted_rotation_is_refused(tmp_path: Path) -> None:
    assert "45 degrees" in error_of(write_video(tmp_path / "slanted.mp4", 3, rotate=45))


def test_damage_elsewhere_in_the_file_does_not_matter(tmp_path: Path) -> None:
    """Only the needed frames are decoded: a window is fine unless the damage is in its own group of pictures."""
    path = write_video(tmp_path / "damaged.mp4", NUM_FRAMES, height=128, width=256, options={"g": "30"})
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    position = packets[31].pos
    data = bytearray(path.read_bytes())
    for i in range(position + 8, packets[40].pos):
        data[i] ^= 0xFF
    path.write_bytes(data)
    assert probe(path).num_frames == NUM_FRAMES
    assert numbers_of(window(path, 0, 30)) == list(range(30))
    assert numbers_of(window(path, 60, 60)) == list(range(60, 120))
    error_of(path, first=25, num_frames=30)


@pytest.mark.parametrize("name", ["start.mp4", "end.mp4", "cut.mkv", "cut.webm", "cut.avi"])
def test_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    codec = {"cut.webm": "libvpx-vp9", "cut.avi": "mpeg4"}.get(name, "libx264")
    container_options = {"movflags": "faststart"} if name == "start.mp4" else {}
    path = write_video(tmp_path / name, NUM_FRAMES, codec=codec, container_options=container_options)
    assert probe(path).num_frames == NUM_FRAMES
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    error_of(path)
    error_of(path, first=0, num_frames=4)


def test_what_is_no_video_is_refused_with_the_reason(tmp_path: Path, b_frames: Path) -> None:
    bad = tmp_path / "bad.mp4"
    assert "No such file" in error_of(bad)
    bad.write_bytes(b"")
    assert "empty" in error_of(bad)
    bad.write_bytes(np.random.default_rng(0).bytes(10_000))
    assert "not a readable video" in error_of(bad)
    bad.write_text("A text about a video.")
    assert "not a readable video" in error_of(bad)
    bad.write_bytes(b_frames.read_bytes()[:40])
    assert "not a readable video" in error_of(bad)
    assert "only audio" in error_of(write_audio(tmp_path / "sound.mp4"))
    (tmp_path / "folder.mp4").mkdir()
    assert "not a regular file" in error_of(tmp_path / "folder.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    assert "not a regular file" in error_of(tmp_path / "fifo.mp4")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        "\ufeff\n#EXTM3U\n{}\n",
        "# a comment\nffconcat version 1.0\nfile {}\n",
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ffconcat"])
def test_playlists_are_not_followed(tmp_path: Path, b_frames: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"list.{suffix}"
    path.write_text(text.format(b_frames))
    error_of(path)


def test_a_picture_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "picture.mp4"
    Image.new("RGB", (64, 64)).save(path, format="PNG")
    assert "not a readable video" in error_of(path)


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "huge.avi", 1, codec="ffv1", height=48, width=80)
    data = path.read_bytes()
    size = struct.pack("<II", 80, 48)
    header = data.index(b"strf")
    assert data.index(size, header) == header + 12
    path.write_bytes(data[:header] + data[header:].replace(size, struct.pack("<II", 16_000, 16_000), 1))
    assert "over 67108864 pixels" in error_of(path)


def test_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 10)
    assert probe(path).num_frames == 10
    write_video(path, 12)
    assert probe(path).num_frames == 12
