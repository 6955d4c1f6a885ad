"""Videos inside tars, read where they are: WebDataset, egocentric data, VideoUFO."""

import json
from pathlib import Path

import pytest

from encode.files import TarMember, head_of, parse_location
from tests.encode.layouts import captions, error_of, read, write_files, write_tar


def test_webdataset_groups_members_by_key(tmp_path: Path) -> None:
    facts = json.dumps({"caption": "two", "score": 5, "size": {"h": 1}})
    write_tar(tmp_path / "b" / "1.tar", {"x.mp4": b"AA", "x.txt": "one\n", "y.json": facts, "y.mp4": b"BBB"})
    write_tar(tmp_path / "a.tar", {"deep/x.y.mp4": b"no", "deep/z.mp4": b"C", "deep/z.txt": "three", "__x.cls": "7"})
    items = read("webdataset", tmp_path).items
    assert captions(items) == {"a/deep/z": "three", "b/1/x": "one", "b/1/y": "two"}
    assert [head_of(item.video, 9) for item in items] == [b"C", b"AA", b"BBB"]
    assert all(isinstance(item.video, TarMember) and parse_location(str(item.video)) == item.video for item in items)
    assert items[2].facts == {"score": 5, "size": {"h": 1}}
    assert captions(read("webdataset", tmp_path / "b" / "1.tar").items) == {"x": "one", "y": "two"}


def test_webdataset_values_choose_whatever_gives_the_caption(tmp_path: Path) -> None:
    members = {}
    for name, score in (("a", 3), ("b", 6), ("c", 9)):
        members |= {
            f"{name}.mp4": b"x",
            f"{name}.txt": name,
            f"{name}.json": json.dumps({"score": score, "factory": 1}),
        }
    write_tar(tmp_path / "part000.tar", members)
    found = read("webdataset", tmp_path, filters={"where": "score > 4"})
    assert captions(found.items) == {"b": "b", "c": "c"} or captions(found.items) == {
        "part000/b": "b",
        "part000/c": "c",
    }
    assert found.left_out["d"]["where"] == 1
    found = read("webdataset", tmp_path, prompt="egocentric", filters={"where": "score < 4 and factory = 1"})
    assert captions(found.items) == {"part000/a": "egocentric"}


def test_egocentric_tars_have_no_captions_but_one_prompt(tmp_path: Path) -> None:
    for worker in ("worker001", "worker002"):
        clip = f"factory001_{worker}_00001"
        facts = {"factory_id": "factory001", "worker_id": worker, "duration_sec": 180.0, "fps": 30.0, "width": 456}
        write_tar(
            tmp_path / "factory001" / worker / "part00.tar", {f"{clip}.mp4": b"x", f"{clip}.json": json.dumps(facts)}
        )
    items = read("webdataset", tmp_path, prompt="First-person view of factory work.").items
    assert list(captions(items)) == [
        f"factory001/{worker}/part00/factory001_{worker}_00001" for worker in ("worker001", "worker002")
    ]
    assert "2 files without a caption" in error_of("webdataset", tmp_path)


def test_webdataset_damage_is_named_together(tmp_path: Path) -> None:
    members = {"a.mp4": b"x", "b.txt": "no video", "c.mp4": b"x", "c.webm": b"x", "c.txt": "two"}
    members |= {"d.mp4": b"x", "d.txt": b"\xff", "e.mp4": b"x", "e.json": "{}", "f.mp4": b"x", "f.txt": " "}
    write_tar(tmp_path / "x.tar", members)
    message = error_of("webdataset", tmp_path)
    assert "1 videos without a caption: x.tar::a (expected a .txt or .json beside it, or set prompt)" in message
    assert "1 captions without a video: x.tar::b" in message
    assert "1 keys with several videos: x.tar::c" in message
    assert "1 captions that are not UTF-8: x.tar::d" in message
    assert "1 files without a caption: x.tar::e" in message
    assert "1 empty captions: x.tar::f" in message


@pytest.mark.parametrize("damage", ["cut", "header", "gz", "empty", "twice", "none", "not videos"])
def test_tars_that_cannot_be_read_in_place_say_so(tmp_path: Path, damage: str) -> None:
    tar = tmp_path / "x.tar"
    members = {"a.mp4": b"x" * 3000, "a.txt": "one", "b.mp4": b"x" * 3000, "b.txt": "two"}
    write_tar(tar, members, "w:gz" if damage == "gz" else "w")
    if damage == "cut":
        tar.write_bytes(tar.read_bytes()[:2000])
    elif damage == "header":
        data = bytearray(tar.read_bytes())
        data[512 + 3072 : 512 + 3072 + 20] = b"?" * 20
        tar.write_bytes(data)
    elif damage == "empty":
        tar.write_bytes(b"")
    elif damage == "twice":
        write_tar(tar, {"a.mp4": b"y"}, "a")
    elif damage == "none":
        tar.rename(tmp_path / "x.zip")
    elif damage == "not videos":
        tar.unlink()
        write_tar(tar, {"a.bin": b"x"})
    message = error_of("webdataset", tmp_path)
    expected = {"twice": "holds a.mp4 twice", "none": "holds no .tar file", "not videos": "holds videos (.avi, .mkv"}
    assert expected.get(damage, f"{tar} is not a readable, uncompressed tar") in message


HEADER = "ID,Topic,Brief Caption,Detailed Caption,Aesthetic Quality\n"


@pytest.fixture
def ufo(tmp_path: Path) -> Path:
    rows = ['1_a,cats,"A cat, asleep.","A grey cat, asleep\non a ""sofa"".",0.7', "2_b,dogs,A dog.,A dog runs.,0.4"]
    write_files(tmp_path, {"VideoUFO.csv": HEADER + "\n".join(rows) + "\n"})
    write_tar(tmp_path / "VideoUFO_tar" / "0.tar", {"0/1_a.mp4": b"one"})
    write_tar(tmp_path / "VideoUFO_tar" / "1.tar", {"1/2_b.mp4": b"two", "1/readme.txt": "x"})
    return tmp_path


def test_videoufo_joins_rows_and_tars(ufo: Path) -> None:
    items = read("videoufo", ufo).items
    assert captions(items) == {"1_a": 'A cat, asleep. A grey cat, asleep\non a "sofa".', "2_b": "A dog. A dog runs."}
    assert [head_of(item.video, 9) for item in items] == [b"one", b"two"]
    assert captions(read("videoufo", ufo / "VideoUFO.csv", captions={"brief": 1}).items)["2_b"] == {"brief": "A dog."}
    several = read("videoufo", ufo, captions={"brief": 1, "detailed": 1}, prompt_prefix="P. ").items
    assert captions(several)["2_b"] == {"brief": "P. A dog.", "detailed": "P. A dog runs."}
    assert captions(read("videoufo", ufo, filters={"where": '"Aesthetic Quality" > 0.5'}).items).keys() == {"1_a"}


def test_videoufo_damage(ufo: Path) -> None:
    write_files(ufo, {"VideoUFO.csv": HEADER + "1_a,x,brief,,1\n1_a,x,b,c,1\n9_z,x,b,c,1\n,x,b,c,1\n"})
    message = error_of("videoufo", ufo)
    assert "1 empty captions: line 2 (brief_detailed)" in message
    assert "1 rows whose video is in no tar (or set allow_missing_videos): line 4 (9_z)" in message
    assert "1 rows without an ID: line 5" in message
    assert "1 videos without a row: 1.tar::1/2_b.mp4" in message
    assert "no column 'Detailed Caption'" in error_of(
        "videoufo", write_files(ufo, {"VideoUFO.csv": "ID,Brief Caption\n1_a,x\n"})
    )
    write_files(ufo, {"other.csv": "x"})
    assert "has to hold one CSV; found VideoUFO.csv, other.csv" in error_of("videoufo", ufo)


def test_part_of_videoufo_is_asked_for(ufo: Path) -> None:
    (ufo / "VideoUFO_tar" / "1.tar").unlink()
    assert "in no tar (or set allow_missing_videos): line 4 (2_b)" in error_of("videoufo", ufo)
    found = read("videoufo", ufo, allow_missing_videos=True)
    assert list(captions(found.items)) == ["1_a"]
    assert found.left_out == {"d": {"allow_missing_videos": 1}}
    write_tar(ufo / "VideoUFO_tar" / "1.tar", {"again/1_a.mp4": b"one"})
    assert "videos that are there twice" in error_of("videoufo", ufo, allow_missing_videos=True)
