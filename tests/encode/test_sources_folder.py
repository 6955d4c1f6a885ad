from pathlib import Path

import pytest

from encode.config import DataConfig, DatasetConfig
from encode.sources import SourceItem, read_sources
from manifests.errors import UsageError


def make(root: Path, videos: list[str], captions: dict[str, str | bytes]) -> Path:
    for name in videos:
        path = root / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (root / "metas").mkdir(parents=True, exist_ok=True)
    for stem, caption in captions.items():
        data = caption if isinstance(caption, bytes) else caption.encode()
        (root / "metas" / f"{stem}.txt").write_bytes(data)
    return root


def read(root: Path, **settings: str) -> list[SourceItem]:
    dataset = DatasetConfig(layout="folder", path=str(root), **settings)
    return read_sources(DataConfig(datasets={"robots": dataset})).items


def error_of(root: Path, **settings: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "robots" in message
    return message


def test_videos_meet_their_captions_in_sorted_order(tmp_path: Path) -> None:
    make(tmp_path, ["b.mp4", "a.webm", "day 2/c.MOV"], {"a": " one\n", "b": "\ufefftwo", "c": "三"})
    items = read(tmp_path, prompt_prefix="Robot: ")
    assert [(item.name, item.captions[""]) for item in items] == [
        ("a", "Robot: one"),
        ("b", "Robot: two"),
        ("c", "Robot: 三"),
    ]
    assert items[2].video == tmp_path / "videos" / "day 2" / "c.MOV"
    assert items[0].dataset == "robots"
    assert items[0].start is None
    assert items[0].end is None


def test_hidden_files_and_other_kinds_are_not_videos(tmp_path: Path) -> None:
    make(tmp_path, ["a.mp4", "._a.mp4", ".trash/b.mp4", "notes.md"], {"a": "one", "._a": "x"})
    assert [item.name for item in read(tmp_path)] == ["a"]


def test_one_prompt_for_all_needs_no_captions(tmp_path: Path) -> None:
    make(tmp_path, ["a.mp4", "b.mp4"], {})
    (tmp_path / "metas").rmdir()
    assert [item.captions[""] for item in read(tmp_path, prompt="A teal robot.")] == ["A teal robot."] * 2
    assert "robots.prompt is empty" in error_of(tmp_path, prompt=" ")


def test_missing_captions_are_counted_and_named(tmp_path: Path) -> None:
    make(tmp_path, [f"{name}.mp4" for name in "abcde"], {"e": "fine"})
    message = error_of(tmp_path)
    assert "4 videos without a caption" in message
    assert "videos/a.mp4 (expected metas/a.txt)" in message
    assert "and 1 more" in message


def test_every_kind_of_problem_is_in_one_message(tmp_path: Path) -> None:
    make(tmp_path, ["a.mp4", "b.mp4", "c.mp4"], {"a": " \n", "b": b"caf\xe9", "z": "no video"})
    message = error_of(tmp_path)
    assert "1 empty captions: metas/a.txt" in message
    assert "1 captions that are not UTF-8: metas/b.txt" in message
    assert "videos/c.mp4" in message
    assert "1 captions without a video: metas/z.txt" in message


def test_equal_stems_are_refused(tmp_path: Path) -> None:
    make(tmp_path, ["left/a.mp4", "right/a.mp4"], {"a": "one"})
    message = error_of(tmp_path)
    assert "left/a.mp4" in message
    assert "right/a.mp4" in message


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none" / "videos") in error_of(tmp_path / "none")
    (tmp_path / "videos").mkdir()
    assert "holds no video" in error_of(tmp_path)
    make(tmp_path, ["a.mp4"], {})
    (tmp_path / "metas").rmdir()
    assert str(tmp_path / "metas") in error_of(tmp_path)


def test_no_dataset_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"data\.datasets is empty"):
        read_sources(DataConfig())
