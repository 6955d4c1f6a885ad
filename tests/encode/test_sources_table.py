import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encode.config import DataConfig, DatasetConfig
from encode.sources import SourceItem, read_sources
from manifests.errors import UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.mp4", "clips/c.mp4"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def read(table: Path, **settings: str) -> list[SourceItem]:
    dataset = DatasetConfig(layout="table", path=str(table), **settings)
    return read_sources(DataConfig(datasets={"gr1": dataset})).items


def error_of(table: Path, **settings: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(table, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "gr1" in message
    return message


def csv_of(root: Path, text: str | bytes) -> Path:
    path = root / "metadata.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def captions(items: list[SourceItem]) -> list[str]:
    return [item.captions[""] for item in items]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_all_kinds_of_table_give_the_same_items(root: Path, kind: str) -> None:
    rows = [
        {"video": "a.mp4", "caption": 'Say "hi", then\nleave', "start": 1.5, "end": 4.0},
        {"video": str(root / "b.mp4"), "caption": "二", "start": None, "end": None},
        {"video": "clips/c.mp4", "caption": "three", "start": None, "end": 2.0},
    ]
    table = root / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        table.write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        table.write_text(
            'video,caption,start,end\na.mp4,"Say ""hi"", then\nleave",1.5,4\n'
            f"{root / 'b.mp4'},二,,\n\nclips/c.mp4,three,,2\n"
        )
    items = read(table, prompt_prefix="P. ")
    assert items == [
        SourceItem(
            dataset="gr1",
            name="a",
            video=root / "a.mp4",
            captions={"": 'P. Say "hi", then\nleave'},
            start=1.5,
            end=4.0,
        ),
        SourceItem(dataset="gr1", name=str(root / "b"), video=root / "b.mp4", captions={"": "P. 二"}),
        SourceItem(dataset="gr1", name="clips/c", video=root / "clips/c.mp4", captions={"": "P. three"}, end=2.0),
    ]


def test_column_names_can_be_chosen(root: Path) -> None:
    table = csv_of(root, "file,text,from,to\na.mp4,one,1,2\n")
    names = {"video_column": "file", "caption_column": "text", "start_column": "from", "end_column": "to"}
    (item,) = read(table, **names)
    assert (item.captions[""], item.start, item.end) == ("one", 1.0, 2.0)


def test_csv_survives_marks_and_white_space(root: Path) -> None:
    table = csv_of(root, '\ufeff video , caption \r\na.mp4, "Pick up, then place"\r\nb.mp4,  two \r\n')
    assert captions(read(table)) == ["Pick up, then place", "two"]


def test_csv_caption_in_the_last_column_may_hold_unquoted_commas(root: Path) -> None:
    table = csv_of(root, 'video,caption\na.mp4,Pick up, then place,here\nb.mp4,"quoted, once"\n')
    assert captions(read(table)) == ["Pick up, then place,here", "quoted, once"]


def test_csv_with_too_many_fields_elsewhere_names_the_line(root: Path) -> None:
    table = csv_of(root, "caption,video\none,a.mp4\npick, place,b.mp4\n")
    assert "line 3 has 3 fields for 2 columns" in error_of(table)


def test_csv_with_an_open_quote_is_refused(root: Path) -> None:
    assert "line 3 is not CSV" in error_of(csv_of(root, 'video,caption\na.mp4,one\nb.mp4,"two\n'))


def test_one_prompt_needs_no_caption_column(root: Path) -> None:
    table = csv_of(root, "video\na.mp4\nb.mp4\n")
    assert captions(read(table, prompt="same")) == ["same", "same"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_missing_column_is_an_error_with_the_nearest_names(root: Path, kind: str) -> None:
    table = root / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"video": ["a.mp4"], "captions": ["one"], "id": [1]}), table)
    elif kind == "jsonl":
        table.write_text('{"video": "a.mp4", "captions": "one", "id": 1}')
    else:
        table.write_text("video,captions,id\na.mp4,one,1\n")
    message = error_of(table)
    assert "no column 'caption'" in message
    assert "gr1.caption_column" in message
    assert "captions" in message


def test_bad_rows_are_named_together(root: Path) -> None:
    rows = [
        {"video": "a.mp4", "caption": " "},
        {"video": "none.mp4", "caption": "x"},
        {"video": "a.mp4"},
        {"caption": "x"},
        {"video": "a.mp4", "caption": "x", "start": "soon"},
        {"video": "a.mp4", "caption": "x", "start": 3, "end": 3},
        {"video": "a.mp4", "caption": "x", "start": -1},
    ]
    table = root / "table.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    message = error_of(table)
    assert "2 rows without a caption: line 1, line 3" in message
    assert "1 rows whose video does not exist: line 2 (none.mp4)" in message
    assert "1 rows without a video: line 4" in message
    assert "2 rows whose 'start' is no number of seconds: line 5 (soon), line 7 (-1)" in message
    assert "1 rows that end before they start: line 6 (3.0 to 3.0)" in message


def test_rows_of_parquet_are_counted_from_one(root: Path) -> None:
    table = root / "table.parquet"
    pq.write_table(pa.table({"video": ["a.mp4", "no.mp4"], "caption": ["one", "two"]}), table)
    assert "row 2 (no.mp4)" in error_of(table)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("t.csv", b"", "has no rows"),
        ("t.csv", b"video,caption\n", "has no rows"),
        ("t.csv", b"video,caption\na.mp4,caf\xe9\n", "not UTF-8 at line 2"),
        ("t.jsonl", b'{"video": "a.mp4"}\n{"video"', "line 2 is not JSON"),
        ("t.jsonl", b'["a.mp4", "one"]', "line 1 is not a JSON object"),
        ("t.parquet", b"PAR1 not really", "not readable Parquet"),
        ("t.xlsx", b"", "no table this layout reads"),
    ],
)
def test_unreadable_tables_say_why(root: Path, name: str, data: bytes, expected: str) -> None:
    (root / name).write_bytes(data)
    assert expected in error_of(root / name)


def test_a_missing_table_is_named(root: Path) -> None:
    assert str(root / "none.csv") in error_of(root / "none.csv")
