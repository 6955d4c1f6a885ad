"""A Hugging Face `videofolder` or `imagefolder`: videos anywhere below a folder, and one metadata file in it.

The file is `metadata.csv`, `.jsonl` or `.parquet` with a column `file_name` (or `video_column`), paths relative to it,
and a caption in `text`, `caption` or `prompt`, in `caption_column`, or in the columns that `captions` names. Split
folders (`train/`) are datasets of their own. Pictures need `media = "images"`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from encode.config import DatasetConfig
from encode.sources import Problems, SourceItem, media_suffixes
from encode.sources.folder import files_below
from encode.sources.table import items_of_table
from encode.tables import SUFFIXES, read_rows
from manifests.errors import UsageError

_CAPTION_COLUMNS = ("text", "caption", "prompt")


def read(name: str, dataset: DatasetConfig, left_out: Counter[str]) -> list[SourceItem]:
    """Items in the order of the rows.

    Raises UsageError for what the layout `table` does, for no metadata file or several, a caption column that cannot
    be told, a file that is named twice, and a video that no row names.
    """
    where = f"data.datasets.{name}"
    root = Path(dataset.path)
    tables = [root / f"metadata{suffix}" for suffix in SUFFIXES if (root / f"metadata{suffix}").is_file()]
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise UsageError(f"{where}: {root} has to hold one of metadata{', metadata'.join(SUFFIXES)}; found {found}")
    [table] = tables
    items = items_of_table(
        name,
        dataset,
        table,
        left_out,
        video_column=dataset.video_column or "file_name",
        caption_column=_caption_column(where, dataset, table),
    )
    problems = Problems(f"{where}: {table.name}")
    times = Counter(item.video for item in items)
    for video in (video for video, count in times.items() if count > 1):
        problems.add("files that several rows name", str(video))
    for video in sorted(files_below(root)):
        if video.suffix.lower() in media_suffixes(dataset) and video not in times:
            problems.add(f"{dataset.media} that no row names", str(video.relative_to(root)))
    problems.raise_any()
    return items


def _caption_column(where: str, dataset: DatasetConfig, table: Path) -> str:
    if dataset.caption_column or dataset.captions or dataset.prompt is not None:
        return dataset.caption_column or ""
    columns, _ = read_rows(where, table, ())
    found = [column for column in _CAPTION_COLUMNS if column in columns]
    if len(found) != 1:
        has = f"has {' and '.join(found)}" if found else f"has none of {', '.join(_CAPTION_COLUMNS)}"
        raise UsageError(f"{where}: {table} {has}: set {where}.caption_column to one of {', '.join(columns)}")
    return found[0]
