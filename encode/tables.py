"""Parquet, CSV and JSONL tables of videos as rows of values.

Text is UTF-8, with or without a byte-order mark. In a CSV whose last column is a caption, it may hold unquoted commas.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from manifests.errors import UsageError

SUFFIXES = (".parquet", ".csv", ".jsonl")

Row = tuple[str, dict[str, Any]]
"""Where the row is, for messages (`row 3`, `line 4`), and its values by stripped column name."""


def read_rows(
    where: str, path: Path, wanted: Collection[str] | None, last: Collection[str] = ()
) -> tuple[list[str], list[Row]]:
    """The names of a table's columns, and its rows with the columns that are wanted; None wants all.

    last: columns that may hold unquoted commas where they are a CSV's last. Raises `UsageError` for a table that is
    not there, of another kind, unreadable, or without rows.
    """
    if not path.is_file():
        raise UsageError(f"{where}: there is no table {path}: correct {where}.path")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{where}: {path.name} is no table this layout reads ({', '.join(SUFFIXES)})")
    at = f"{where}: {path}"
    if suffix == ".csv":
        columns, rows = _read_csv(at, path, wanted, last)
    else:
        columns, rows = (_read_parquet if suffix == ".parquet" else _read_jsonl)(at, path, wanted)
    if not rows:
        raise UsageError(f"{where}: {path} has no rows")
    return columns, rows


def require_column(field: str, column: str, columns: Collection[str], path: Path) -> None:
    """Raise `UsageError` that names the nearest columns unless the table has one. field: the setting that names it."""
    if column in columns:
        return
    near = difflib.get_close_matches(column, columns, n=3, cutoff=0.4) or columns
    raise UsageError(f"{path} has no column {column!r}: set {field} to one it has, such as {', '.join(near)}")


def with_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a CSV with the columns as numbers that hold nothing but numbers, and nulls where a field is empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    numeric = [name for name in columns if all(_number(row.get(name)) is not None for row in rows if row.get(name))]
    changed = [{name: row.get(name) or None for name in columns} for row in rows]
    for row in changed:
        row.update({name: _number(row[name]) for name in numeric})
    return changed


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _read_parquet(where: str, path: Path, wanted: Collection[str] | None) -> tuple[list[str], list[Row]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {column.strip(): column for column in file.schema_arrow.names}
            table = file.read(columns=[columns[column] for column in columns if wanted is None or column in wanted])
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{where} is not readable Parquet: {_one_line(error)}") from error
    table = table.rename_columns([column.strip() for column in table.column_names])
    return list(columns), [(f"row {i}", row) for i, row in enumerate(table.to_pylist(), start=1)]


def _read_jsonl(where: str, path: Path, wanted: Collection[str] | None) -> tuple[list[str], list[Row]]:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, line in enumerate(read_text(where, path).splitlines(), start=1):
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


def _read_csv(
    where: str, path: Path, wanted: Collection[str] | None, last: Collection[str]
) -> tuple[list[str], list[Row]]:
    columns: list[str] = []
    rows: list[Row] = []
    for number, record, fields in _csv_records(where, read_text(where, path)):
        if not fields:
            continue
        if not columns:
            columns = [field.strip() for field in fields]
            continue
        if len(fields) > len(columns) and columns[-1] in last:
            fields = _rejoin_last(record, len(columns))
        if len(fields) > len(columns):
            raise UsageError(
                f"{where}, line {number} has {len(fields)} fields for {len(columns)} columns: quote texts with commas"
            )
        row = dict(zip(columns, fields, strict=False))
        rows.append((f"line {number}", {c: row[c] for c in row if wanted is None or c in wanted}))
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


def read_text(where: str, path: Path) -> str:
    """A UTF-8 text without its byte-order mark; `UsageError` names the line that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{where} is not UTF-8 at line {line}: save it as UTF-8") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
