"""A Parquet, CSV or JSONL table with one row a video: its path, captions and, optionally, seconds and a weight.

Paths are relative to the table's folder, or absolute. The caption is the column `caption_column` ("caption"), or there
are several: the columns that `captions` names. Columns `depth`, `seg` and `image_context` name given hints, where
`encode.hints` asks for them. `encode.tables` says how tables are read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from encode.config import DatasetConfig
from encode.sources import Problems, SourceItem, prefixed, prompt_of
from encode.tables import Row, read_rows, require_column, with_numbers
from manifests.errors import UsageError
from manifests.hints import GIVEN
from manifests.image_context import IMAGE


def read(name: str, dataset: DatasetConfig, left_out: Counter[str]) -> list[SourceItem]:
    """Items in the order of the rows. With `prompt`, no caption column is read.

    Raises UsageError for: an unreadable table or one without rows, a missing column (names the nearest), a row
    whose video is missing (unless `allow_missing_videos`), whose caption is missing or empty, whose seconds are not a
    range, or whose weight is none.
    """
    return items_of_table(
        name,
        dataset,
        Path(dataset.path),
        left_out,
        video_column=dataset.video_column or "video",
        caption_column=dataset.caption_column or "caption",
    )


def items_of_table(
    name: str,
    dataset: DatasetConfig,
    path: Path,
    left_out: Counter[str],
    *,
    video_column: str,
    caption_column: str,
) -> list[SourceItem]:
    """`read` of a table at `path` with these columns, whose videos lie in its folder."""
    where = f"data.datasets.{name}"
    prompt = prompt_of(where, dataset)
    captions = [] if prompt is not None else list(dataset.captions or [caption_column])
    wanted = {video_column, *captions, dataset.start_column, dataset.end_column, dataset.weight_column}
    wanted |= {*GIVEN, IMAGE}
    columns, rows = read_rows(where, path, None if dataset.filters.where else wanted, captions)
    require_column(f"{where}.video_column", video_column, columns, path)
    for column in captions:
        require_column(f"{where}.{'captions' if dataset.captions else 'caption_column'}", column, columns, path)
    facts = _facts(dataset, path, rows)

    problems = Problems(f"{where}: {path.name}")
    items = []
    for (label, row), values in zip(rows, facts, strict=True):
        video = _video(row.get(video_column), path.parent, label, problems, left_out, dataset)
        texts = prompt if prompt is not None else _captions(row, captions, dataset, label, problems)
        start = _number(row.get(dataset.start_column), dataset.start_column, label, problems, "number of seconds")
        end = _number(row.get(dataset.end_column), dataset.end_column, label, problems, "number of seconds")
        weight = _number(row.get(dataset.weight_column), dataset.weight_column, label, problems, "weight of 0 or more")
        if end is not None and end <= (start or 0.0):
            problems.add("rows that end before they start", f"{label} ({start or 0.0} to {end})")
        if video is not None and texts is not None:
            stem = str(Path(str(row[video_column]).strip()).with_suffix(""))
            items.append(
                SourceItem(
                    dataset=name,
                    name=stem,
                    video=video,
                    captions=prefixed(dataset, texts),
                    start=start,
                    end=end,
                    weight=weight,
                    facts=values,
                    hints={kind: path.parent / str(row[kind]).strip() for kind in (*GIVEN, IMAGE) if row.get(kind)},
                )
            )
    problems.raise_any()
    if not items:
        raise UsageError(f"{where}: none of the {len(rows)} videos that {path} names is there")
    if all(item.weight == 0 for item in items):
        raise UsageError(
            f"{where}: {path}: the column {dataset.weight_column!r} sums to 0; give one row at least a share"
        )
    return items


def _facts(dataset: DatasetConfig, path: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    if dataset.filters.where is None:
        return [{}] * len(rows)
    values = [row for _, row in rows]
    return with_numbers(values) if path.suffix.lower() == ".csv" else values


def _video(
    value: Any, folder: Path, label: str, problems: Problems, left_out: Counter[str], dataset: DatasetConfig
) -> Path | None:
    if not isinstance(value, str) or not value.strip():
        problems.add("rows without a video", label)
        return None
    video = folder / value.strip()
    if not video.is_file():
        if dataset.allow_missing_videos:
            left_out["allow_missing_videos"] += 1
        else:
            problems.add("rows whose video does not exist", f"{label} ({value.strip()})")
        return None
    return video


def _captions(
    row: dict[str, Any], columns: Sequence[str], dataset: DatasetConfig, label: str, problems: Problems
) -> dict[str, str] | None:
    texts = {column: row.get(column) for column in columns}
    empty = [column for column, value in texts.items() if not isinstance(value, str) or not value.strip()]
    if empty:
        problems.add("rows without a caption", f"{label} ({', '.join(empty)})" if dataset.captions else label)
        return None
    return {column if dataset.captions else "": str(value).strip() for column, value in texts.items()}


def _number(value: Any, column: str, label: str, problems: Problems, what: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        problems.add(f"rows whose {column!r} is no {what}", f"{label} ({value})")
        return None
    return number
