"""A Parquet, CSV or JSONL table with one row a video: its path, caption and, optionally, seconds from and to.

Paths are relative to the table's folder, or absolute. Text is UTF-8, with or without a byte-order mark. In a CSV
whose last column is the caption, the caption may hold unquoted commas.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from encode.config import DatasetConfig
from encode.sources import Problems, SourceItem, prompt_of
from manifests.errors import UsageError

Row = tuple[str, dict[str, Any]]
"""Where the row is, for messages (`row 3`, `line 4`), and its values by stripped column name."""


def read(name: str, dataset: DatasetConfig) -> list[SourceItem]:
    """Items in the order of the rows. With `prompt`, the caption column is not read.

    Raises UsageError for: an unreadable table or one without rows, a missing column (names the nearest), a row
    whose video is missing, whose caption is missing or empty, or whose seconds are not a range.
    """
    where = f"data.datasets.{name}"
    path = Path(dataset.path)
    if not path.is_file():
        raise UsageError(f"{where}: there is no table {path}: correct {where}.path")
    if path.suffix.lower() not in _READERS:
        raise UsageError(f"{where}: {path.name} is no table this layout reads ({', '.join(_READERS)})")
    prompt = None if dataset.prompt is None else prompt_of(where, dataset.prompt)
    columns, rows = _READERS[path.suffix.lower()](f"{where}: {path}", path, dataset)
    if not rows:
        raise UsageError(f"{where}: {path} has no rows")
    _require(f"{where}.video_column", dataset.video_column, columns, path)
    if prompt is None:
        _require(f"{where}.caption_column", dataset.caption_column, columns, path)

    problems = Problems(f"{where}: {path.name}")
    items = []
    for label, row in rows:
        video = _video(row.get(dataset.video_column), path.parent, label, problems)
        caption = prompt if prompt is not None else _caption(row.get(dataset.caption_column), label, problems)
        start = _seconds(row.get(dataset.start_column), dataset.start_column, label, problems)
        end = _seconds(row.get(dataset.end_column), dataset.end_column, label, problems)
        if end is not None and end <= (start or 0.0):
            problems.add("rows that end before they start", f"{label} ({start or 0.0} to {end})")
        if video is not None and caption is not None:
            stem = str(Path(str(row[dataset.video_column]).strip()).with_suffix(""))
            items.append(
                SourceItem(
                    dataset=name,
                    name=stem,
                    video=video,
                    caption=dataset.prompt_prefix + caption,
                    start=start,
                    end=end,
                )
            )
    problems.raise_any()
    return items


def _require(field: str, column: str, columns: list[str], path: Path) -> None:
    if column in columns:
        return
    near = difflib.get_close_matches(column, columns, n=3, cutoff=0.4) or columns
    raise UsageError(f"{path} has no column {column!r}: set {field} to one it has, such as {', '.join(near)}")


def _video(value: Any, folder: Path, label: str, problems: Problems) -> Path | None:
    if not isinstance(value, str) or not value.strip():
        problems.add("rows without a video", label)
        return None
    video = folder / value.strip()
    if not video.is_file():
        problems.add("rows whose video does not exist", f"{label} ({value.strip()})")
        return None
    return video


def _caption(value: Any, label: str, problems: Problems) -> str | None:
    if not isinstance(value, str) or not value.strip():
        problems.add("rows without a caption", label)
        return None
    return value.strip()


def _seconds(value: Any, column: str, label: str, problems: Problems) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        problems.add(f"rows whose {column!r} is no number of seconds", f"{label} ({value})")
        return None
    return seconds


def _read_parquet(where: str, path: Path, dataset: DatasetConfig) -> tuple[list[str], list[Row]]:
    wanted = {dataset.video_column, dataset.caption_column, dataset.start_column, dataset.end_column}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {column.strip(): column for column in file.schema_arrow.names}
            table = file.read(columns=[columns[column] for column in columns if column in wanted])
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{where} is not readable Parquet: {_one_line(error)}") from error
    table = table.rename_columns([column.strip() for column in table.column_names])
    return list(columns), [(f"row {i}", row) for i, row in enumerate(table.to_pylist(), start=1)]


def _read_jsonl(where: str, path: Path, dataset: DatasetConfig) -> tuple[list[str], list[Row]]:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, line in enumerate(_text(where, path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}, line {number} is not JSON: {_one_line(error)}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}, line {number} is not a JSON object")
        row = {column.strip(): value for column, value in row.items()}
        columns.update(dict.fromkeys(row))
        rows.append((f"line {number}", row))
    return list(columns), rows


def _read_csv(where: str, path: Path, dataset: DatasetConfig) -> tuple[list[str], list[Row]]:
    columns: list[str] = []
    rows: list[Row] = []
    for number, record, fields in _csv_records(where, _text(where, path)):
        if not fields:
            continue
        if not columns:
            columns = [field.strip() for field in fields]
            continue
        if len(fields) > len(columns) and columns[-1] == dataset.caption_column:
            fields = _rejoin_last(record, len(columns))
        if len(fields) > len(columns):
            raise UsageError(
                f"{where}, line {number} has {len(fields)} fields for {len(columns)} columns: quote texts with commas"
            )
        rows.append((f"line {number}", dict(zip(columns, fields, strict=False))))
    return columns, rows


def _csv_records(where: str, text: str) -> Iterator[tuple[int, str, list[str]]]:
    """(number of the first line, raw text, fields) of each record; a record may span lines."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in text.splitlines(keepends=True):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), skipinitialspace=True, strict=True)
    number = 1
    try:
        for fields in reader:
            yield number, "".join(taken), fields
            taken.clear()
            number = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{where}, line {number} is not CSV: {_one_line(error)}") from error


def _rejoin_last(record: str, num_columns: int) -> list[str]:
    """The fields of a record whose last one has unquoted commas, with the white space around them kept."""
    fields = next(csv.reader([record.rstrip("\r\n")]))
    return [*fields[: num_columns - 1], ",".join(fields[num_columns - 1 :])]


def _text(where: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{where} is not UTF-8 at line {line}: save it as UTF-8") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_READERS = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}
