"""A video inside a tar is the same video: hash, probe, frames, cache keys; nothing around it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from encode.decode import DecodeJob, decode_window
from encode.files import TarMember, digest_of, ffmpeg_url, name_of, parse_location, state_of
from encode.pool import DecodePool
from encode.probe import DecodeError, probe
from encode.tars import groups_of
from manifests.keys import file_digest
from tests.encode.layouts import write_tar
from tests.encode.video_files import numbered_picture, numbers_of, write_video


@pytest.fixture
def videos(tmp_path: Path) -> dict[str, Path]:
    write_video(tmp_path / "a.mp4", 40, fps=10)
    write_video(tmp_path / "b.mkv", 20, fps=10, options={"g": "5"})
    write_video(tmp_path / "c.mp4", 30, fps=10, container_options={"movflags": "faststart"})
    return {name: tmp_path / name for name in ("a.mp4", "b.mkv", "c.mp4")}


def tar_of(folder: Path, videos: dict[str, Path]) -> dict[str, TarMember]:
    """A tar with an awkward name, in a folder with one, and its members by suffix-less name."""
    tar = write_tar(
        folder / "odd, {name}: 100%" / "x, y.tar", {name: path.read_bytes() for name, path in videos.items()}
    )
    return {group.key: member for group in groups_of("here", tar) for member in group.members.values()}


def window(video: Path | TarMember | str, first: int) -> DecodeJob:
    return DecodeJob(path=video, first=first, num_frames=5, fps=10.0, height=64, width=128)


def test_a_member_decodes_as_its_file_does(tmp_path: Path, videos: dict[str, Path]) -> None:
    for key, member in tar_of(tmp_path, videos).items():
        file = next(path for path in videos.values() if path.stem == key)
        assert probe(member) == probe(file)
        assert digest_of(member) == digest_of(file) == file_digest(file)
        for first in (0, 7, 14):
            frames = decode_window(window(str(member), first))
            assert numbers_of(frames) == list(range(first, first + 5))
            assert np.array_equal(frames, decode_window(window(file, first)))


def test_members_go_through_the_killable_decoders(tmp_path: Path, videos: dict[str, Path]) -> None:
    member = tar_of(tmp_path, videos)["b"]
    before = sorted(tmp_path.rglob("*"))
    with DecodePool(1, 60.0) as pool:
        assert pool.probe(member).result().num_frames == 20
        assert numbers_of(pool.submit(window(member, 3)).result()) == [3, 4, 5, 6, 7]
        broken = TarMember(member.tar, "b.mkv", member.offset, member.size // 2)
        with pytest.raises(DecodeError, match=r"x, y\.tar::b\.mkv@\d+\+\d+: "):
            pool.probe(broken).result()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_video_in_a_tar_is_refused_as_a_file_is(tmp_path: Path) -> None:
    members = {"a.mp4": b"", "b.mp4": b"no video", "c.mp4": b"#EXTM3U\n/etc/passwd\n"}
    for group in groups_of("here", write_tar(tmp_path / "x.tar", members)):
        with pytest.raises(DecodeError, match=r"x\.tar::[abc]\.mp4@\d+\+\d+: (empty|not a readable video|a playlist)"):
            probe(group.members[".mp4"])


def test_a_tar_cut_after_it_was_listed_is_an_error(tmp_path: Path, videos: dict[str, Path]) -> None:
    member = tar_of(tmp_path, videos)["c"]
    with open(member.tar, "r+b") as file:
        file.truncate(member.offset + member.size // 2)
    with pytest.raises(OSError, match="too early"):
        digest_of(member)
    with pytest.raises(DecodeError):
        decode_window(window(member, 20))


def test_a_location_is_text_that_reads_back(tmp_path: Path) -> None:
    member = TarMember(tmp_path / "a::b@1+2.tar", "d/e::f@3+4.mp4", 512, 99)
    assert parse_location(str(member)) == member
    assert parse_location(str(tmp_path / "v.mp4")) == tmp_path / "v.mp4"
    assert name_of(member) == "e::f@3+4.mp4"
    assert ffmpeg_url(member).startswith("subfile,,start,512,end,611,,:file:/")


def test_the_state_of_a_member_is_its_tars(tmp_path: Path, videos: dict[str, Path]) -> None:
    member = tar_of(tmp_path, videos)["a"]
    link = tmp_path / "link.tar"
    link.symlink_to(member.tar)
    state = state_of(TarMember(link, member.name, member.offset, member.size))
    assert state == state_of(member)
    assert parse_location(state.location) == TarMember(member.tar.resolve(), member.name, member.offset, member.size)
    assert (state.size, state.modified_ns) == (videos["a.mp4"].stat().st_size, member.tar.stat().st_mtime_ns)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg"])
def test_a_picture_is_a_video_of_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(numbered_picture(37, 64, 128)).save(path)
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.variable_frame_rate) == (1, 64, 128, False)
    member = next(iter(groups_of("here", write_tar(tmp_path / "x.tar", {path.name: path.read_bytes()})))).members
    for video in (path, member[f".{suffix}"]):
        for fps in (None, 16.0):
            job = DecodeJob(path=video, first=0, num_frames=1, fps=fps, height=64, width=128)
            assert numbers_of(decode_window(job)) == [37]
    path.write_bytes(path.read_bytes()[:200])
    error = "not a readable video|no frame|no picture"
    with pytest.raises(DecodeError, match=error):
        probe(path)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_jpeg_is_turned_as_its_exif_says(tmp_path: Path, number: int) -> None:
    pixels = numbered_picture(37, 64, 128)
    pixels[:20] = 120  # no symmetry
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "x.jpg")
    assert (info.height, info.width) == ((128, 64) if number > 4 else (64, 128))
    size = {"height": info.height, "width": info.width}
    job = DecodeJob(path=tmp_path / "x.jpg", first=0, num_frames=1, fps=None, **size)
    turned = decode_window(job)[0]
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg")))
    assert np.abs(turned.astype(int) - expected).mean() < 12


def test_a_picture_with_a_videos_name_stays_no_video(tmp_path: Path) -> None:
    Image.fromarray(numbered_picture(5, 64, 128)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.mp4")
    with pytest.raises(DecodeError, match="not a readable video"):
        probe(tmp_path / "x.mp4")


def test_a_video_is_known_by_its_resolved_path_however_it_is_reached(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.mp4").write_bytes(b"a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "link" / "a.mp4")
    monkeypatch.chdir(tmp_path / "link")
    folders: dict[str, str] = {}
    ways = [Path("a.mp4"), tmp_path / "real/a.mp4", tmp_path / "link/a.mp4", tmp_path / "b.mp4", Path("../link/a.mp4")]
    assert {state_of(path) for path in ways} == {state_of(path, folders) for path in [*ways, *ways]}
    assert {state_of(path).location for path in ways} == {str((tmp_path / "real/a.mp4").resolve())}
