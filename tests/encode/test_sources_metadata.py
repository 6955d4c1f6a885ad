"""One file for all captions: GR1, Hugging Face folders, and tables with several captions, weights and more columns."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.encode.layouts import captions, error_of, read, write_files

PREFIX = "The robot arm is performing a task. "


@pytest.mark.parametrize("folder", ["", "videos/"])
def test_gr1_splits_on_the_first_comma_and_strips_quotes(tmp_path: Path, folder: str) -> None:
    write_files(tmp_path, {f"{folder}{name}.mp4": b"" for name in ("0", "1", "2")})
    lines = ["video,prompt", "0.mp4,Pick up, then place", '1.mp4, "Say "hi", twice" ', "", '"2.mp4","plain"']
    write_files(tmp_path, {"metadata.csv": "\ufeff" + "\r\n".join(lines)})
    items = read("gr1", tmp_path, prompt_prefix=PREFIX).items
    assert [item.captions[""].removeprefix(PREFIX) for item in items] == [
        "Pick up, then place",
        'Say "hi", twice',
        "plain",
    ]
    assert all(item.captions[""].startswith(PREFIX) for item in items)
    assert items[0].video == tmp_path / f"{folder}0.mp4"


def test_gr1_names_with_the_folder_they_were_published_in_are_found_in_videos(tmp_path: Path) -> None:
    write_files(tmp_path, {"videos/0.mp4": b"", "metadata.csv": "video,prompt\ngr1/0.mp4,one\n"})
    assert captions(read("gr1", tmp_path).items) == {"gr1/0": "one"}


def test_gr1_damage_is_named_together(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{name}.mp4": b"" for name in "abcx"} | {"videos/c.mp4": b""})
    lines = ["video,prompt", "a.mp4,one", "a.mp4,again", "b.mp4", "b.mp4,", "no.mp4,two", "c.mp4,three", ",x"]
    write_files(tmp_path, {"metadata.csv": "\n".join(lines)})
    message = error_of("gr1", tmp_path)
    assert "1 lines of a video that has one: line 3 (a.mp4)" in message
    assert "2 lines that are not video,prompt: line 4, line 8" in message
    assert "1 lines without a prompt: line 5" in message
    assert "1 lines whose video does not exist: line 6 (no.mp4)" in message
    assert "1 lines whose video is in two places: line 7" in message
    assert "videos without a line: b.mp4, c.mp4, videos/c.mp4 and 1 more" in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "begins with '', not with video,prompt"),
        (b"file,text\na.mp4,x\n", "begins with 'file,text', not with video,prompt"),
        (b"video,prompt\na.mp4,caf\xe9\n", "is not UTF-8 at line 2"),
        (b"video,prompt\n", "videos without a line: a.mp4"),
    ],
)
def test_gr1_tables_that_are_none_say_why(tmp_path: Path, data: bytes, expected: str) -> None:
    write_files(tmp_path, {"a.mp4": b"", "metadata.csv": data})
    assert expected in error_of("gr1", tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_hugging_face_folders(tmp_path: Path, kind: str, column: str) -> None:
    write_files(tmp_path, {"a.mp4": b"", "sub/b.mp4": b"", ".cache/c.mp4": b""})
    rows = [{"file_name": "a.mp4", column: "one, or so"}, {"file_name": "sub/b.mp4", column: "two"}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    else:
        text = "\n".join(json.dumps(row) for row in rows)
        csv = f'file_name,{column}\na.mp4,"one, or so"\nsub/b.mp4,two\n'
        write_files(tmp_path, {f"metadata.{kind}": csv if kind == "csv" else text})
    assert captions(read("huggingface", tmp_path).items) == {"a": "one, or so", "sub/b": "two"}


def test_hugging_face_damage(tmp_path: Path) -> None:
    assert "has to hold one of metadata.parquet, metadata.csv, metadata.jsonl; found none" in error_of(
        "huggingface", tmp_path
    )
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b"", "metadata.csv": "file_name,text,caption\na.mp4,x,y\n"})
    assert "has text and caption: set data.datasets.d.caption_column" in error_of("huggingface", tmp_path)
    assert "1 videos that no row names: b.mp4" in error_of("huggingface", tmp_path, caption_column="text")
    write_files(tmp_path, {"metadata.csv": "file_name,text\na.mp4,x\nb.mp4,y\nb.mp4,z\nc.mp4,w\n"})
    assert "rows whose video does not exist: line 5 (c.mp4)" in error_of("huggingface", tmp_path)
    assert "1 files that several rows name:" in error_of("huggingface", tmp_path, allow_missing_videos=True)
    write_files(tmp_path, {"metadata.csv": "file_name,label\na.mp4,x\n"})
    assert "has none of text, caption, prompt" in error_of("huggingface", tmp_path)
    write_files(tmp_path, {"metadata.jsonl": "{}"})
    assert "found metadata.csv, metadata.jsonl" in error_of("huggingface", tmp_path)


TABLE = "video,long,short,weight,score,source,caption\na.mp4,A tale.,Tale.,2.5,7,web,x\nb.mp4,B tale.,Bee.,,4.5,own,y\n"


def test_tables_have_several_captions_and_weights(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b"", "t.csv": TABLE})
    items = read("table", tmp_path / "t.csv", captions={"long": 1, "short": 2}).items
    assert captions(items) == {"a": {"long": "A tale.", "short": "Tale."}, "b": {"long": "B tale.", "short": "Bee."}}
    assert [item.weight for item in items] == [2.5, None]
    assert captions(read("table", tmp_path / "t.csv", captions={"long": 1}).items)["a"] == {"long": "A tale."}
    assert "set data.datasets.d.captions to one it has, such as long" in error_of(
        "table", tmp_path / "t.csv", captions={"longer": 1}
    )


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("score >= 5", ["a"]),
        ("source in ('own') or score < 1", ["b"]),
        ("weight is null", ["b"]),
        ("score > 0", ["a", "b"]),
    ],
)
def test_rows_are_chosen_by_their_other_columns(tmp_path: Path, where: str, kept: list[str]) -> None:
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b"", "t.csv": TABLE})
    rows = [{"video": "a.mp4", "caption": "x", "score": 7, "source": "web", "weight": 2.5, "box": [1, 2]}]
    rows.append({"video": "b.mp4", "caption": "y", "score": 4.5, "source": "own"})
    write_files(tmp_path, {"t.jsonl": "\n".join(map(json.dumps, rows))})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        found = read("table", tmp_path / f"t.{kind}", filters={"where": where})
        assert [item.name for item in found.items] == kept
        assert found.left_out["d"]["where"] == 2 - len(kept)


def test_conditions_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b"", "t.csv": TABLE, "videos/a.mp4": b"", "metas/a.txt": "x"})
    message = error_of("table", tmp_path / "t.csv", filters={"where": "scor > 3"})
    assert "data.datasets.d.filters.where 'scor > 3': no column 'scor'; did you mean 'score'?" in message
    assert "expected a value" in error_of("table", tmp_path / "t.csv", filters={"where": "score >"})
    assert "has no values beside its captions" in error_of("folder", tmp_path, filters={"where": "score > 3"})


def test_weights_that_are_none_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.mp4": b"", "t.csv": "video,caption,weight\na.mp4,x,-1\na.mp4,y,much\na.mp4,z,inf\n"})
    assert "3 rows whose 'weight' is no weight of 0 or more: line 2 (-1), line 3 (much), line 4 (inf)" in error_of(
        "table", tmp_path / "t.csv"
    )
    write_files(tmp_path, {"t.csv": "video,caption,weight\na.mp4,x,0\na.mp4,y,0\n"})
    assert "the column 'weight' sums to 0" in error_of("table", tmp_path / "t.csv")
