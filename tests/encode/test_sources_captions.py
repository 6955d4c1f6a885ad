"""Captions in JSON and text, in the folder layouts: NeMo, sports, Transfer, evaluation pairs, images."""

import json
from pathlib import Path

import pytest

from tests.encode.layouts import captions, error_of, read, write_files

THREE = {"long": "A long story.", "medium": "A story.", "short": "Story."}


def test_nemo_captions_of_a_model_by_length_with_and_without_outer_braces(tmp_path: Path) -> None:
    whole = json.dumps({"qwen2.5-vl": THREE})
    write_files(tmp_path, {"videos/a.mp4": b"", "videos/b.mp4": b"", "videos/c.mp4": b""})
    write_files(tmp_path, {"captions/a.json": whole, "captions/b.json": f"\ufeff {whole[1:-1]},\n"})
    write_files(tmp_path, {"captions/c.json": json.dumps(THREE)})
    assert captions(read("folder", tmp_path).items) == {"a": THREE, "b": THREE, "c": THREE}
    chosen = read("folder", tmp_path, captions={"short": 3, "long": 1}, prompt_prefix="P. ").items
    assert captions(chosen)["b"] == {"long": "P. A long story.", "short": "P. Story."}


def test_transfer_captions_in_json_come_before_metas(tmp_path: Path) -> None:
    write_files(tmp_path, {f"videos/{name}.mp4": b"" for name in "abcd"})
    write_files(tmp_path, {"captions/a.json": '{"caption": " one ", "score": 3}', "captions/b.json": '{"text": "two"}'})
    write_files(tmp_path, {"captions/c.json": '{"prompt": "three"}', "metas/a.txt": "not this", "metas/d.txt": "four"})
    items = read("folder", tmp_path).items
    assert captions(items) == {"a": "one", "b": "two", "c": "three", "d": "four"}
    assert items[0].facts == {"score": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"caption": "a", "text": "b"}',
            "files with several captions of one meaning: captions/a.json (caption, text)",
        ),
        (
            '{"one": {"long": "x"}, "two": {"long": "y"}}',
            "several models (set caption_model): captions/a.json (one, two)",
        ),
        ('{"score": 3}', "files without a caption: captions/a.json (it has score; expected caption, text or prompt)"),
        ('{"caption": 3}', "captions that are not text: captions/a.json (caption)"),
        ('{"caption": " "}', "empty captions: captions/a.json (caption)"),
        ('{"m": {"long": "x", "short": ""}}', "empty captions: captions/a.json (short)"),
        ('"m": {"long": "x"', "files that are not JSON: captions/a.json (line 1"),
        ('["x"]', "files that are not a JSON object: captions/a.json"),
        ("", "empty captions: captions/a.json"),
        (b'{"caption": "caf\xe9"}', "captions that are not UTF-8: captions/a.json"),
    ],
)
def test_damaged_caption_files_are_named(tmp_path: Path, text: str | bytes, expected: str) -> None:
    write_files(tmp_path, {"videos/a.mp4": b"", "captions/a.json": text})
    assert expected in error_of("folder", tmp_path)


def test_a_model_and_names_can_be_asked_for_and_must_be_there(tmp_path: Path) -> None:
    both = json.dumps({"one": THREE, "two": {"long": "Else."}})
    write_files(tmp_path, {"videos/a.mp4": b"", "captions/a.json": both})
    assert captions(read("folder", tmp_path, caption_model="two").items) == {"a": {"long": "Else."}}
    assert "captions without the model 'three': captions/a.json (has one, two)" in error_of(
        "folder", tmp_path, caption_model="three"
    )
    message = error_of("folder", tmp_path, caption_model="two", captions={"short": 1, "long": 1})
    assert "captions without short: captions/a.json (has long)" in message
    write_files(tmp_path, {"captions/a.json": '{"caption": "alone"}'})
    assert "captions without short: captions/a.json (it has a single one)" in error_of(
        "folder", tmp_path, captions={"short": 1}
    )


def test_captions_of_neither_folder_may_lack_a_video(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"videos/a.mp4": b"", "captions/b.json": '{"text": "x"}', "metas/a.txt": "y", "metas/c.txt": "z"}
    )
    assert "2 captions without a video: captions/b.json, metas/c.txt" in error_of("folder", tmp_path)
    found = read("folder", tmp_path, allow_missing_videos=True)
    assert captions(found.items) == {"a": "y"}
    assert found.left_out == {"d": {"allow_missing_videos": 2}}


def test_evaluation_pairs_lie_side_by_side_also_with_two_dots(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {"a.mp4": b"", "a.txt": "one", "b.c.mp4": b"", "b.c..txt": "two", "d.MOV": b"", "d.json": '{"text": "3"}'},
    )
    assert captions(read("pairs", tmp_path).items) == {"a": "one", "b.c": "two", "d": "3"}
    write_files(tmp_path, {"a..txt": "again", "e.mp4": b"", "f.txt": "no video"})
    message = error_of("pairs", tmp_path)
    assert "1 captions of one video in two files: a..txt and a.txt" in message
    assert "1 videos without a caption: e.mp4 (expected e.txt)" in message
    assert "1 captions without a video: f.txt" in message


def test_two_dots_are_read_in_metas_too(tmp_path: Path) -> None:
    write_files(tmp_path, {"videos/a.mp4": b"", "metas/a..txt": "one"})
    assert captions(read("folder", tmp_path).items) == {"a": "one"}


@pytest.mark.parametrize("layout", ["folder", "pairs"])
def test_images_are_asked_for(tmp_path: Path, layout: str) -> None:
    media, metas = ("images/", "metas/") if layout == "folder" else ("", "")
    write_files(tmp_path, {f"{media}a.jpg": b"", f"{media}b.PNG": b"", f"{metas}a.txt": "one", f"{metas}b.txt": "two"})
    assert captions(read(layout, tmp_path, media="images").items) == {"a": "one", "b": "two"}
    assert ("set media to images" if layout == "folder" else "holds no video") in error_of(layout, tmp_path)


def test_a_prompt_for_all_reads_no_captions(tmp_path: Path) -> None:
    write_files(tmp_path, {"videos/a.mp4": b"", "captions/a.json": "not JSON", "a.mp4": b""})
    for layout in ("folder", "pairs"):
        items = read(layout, tmp_path, prompt="A video of sks teal robot.").items
        assert captions(items) == {"a": "A video of sks teal robot."}
