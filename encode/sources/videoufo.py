"""VideoUFO: a CSV with `ID`, `Brief Caption` and `Detailed Caption`, and tars of `<ID>.mp4`, read in place.

`path` is the CSV, or a folder that holds one; the tars lie at any depth beside it. `captions` chooses among `brief`,
`detailed` and `brief_detailed` (both, with a space between), which is the default. Who has only some of the tars
sets `allow_missing_videos`. The public recipe keeps videos of at least 93 frames: `filters.min_frames = 93`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from encode.caption_files import CaptionFault, select
from encode.config import DatasetConfig
from encode.files import TarMember
from encode.sources import Problems, SourceItem, media_suffixes, prefixed, prompt_of
from encode.tables import read_rows, require_column, with_numbers
from encode.tars import members_of, tars_at
from manifests.errors import UsageError

_ID, _BRIEF, _DETAILED = "ID", "Brief Caption", "Detailed Caption"


def read(name: str, dataset: DatasetConfig, left_out: Counter[str]) -> list[SourceItem]:
    """Items in the order of the rows. With `prompt`, no captions are read.

    Raises UsageError for: no CSV or several, a missing column, no tar, a torn one, an ID or a video that is there
    twice, a row without its video (unless `allow_missing_videos`) or caption, a video without a row.
    """
    where = f"data.datasets.{name}"
    table = _table(where, Path(dataset.path))
    prompt = prompt_of(where, dataset)
    wanted = (_ID,) if prompt is not None else (_ID, _BRIEF, _DETAILED)
    columns, rows = read_rows(where, table, None if dataset.filters.where else wanted)
    for column in wanted:
        require_column(f"{where}.path", column, columns, table)
    facts = with_numbers([row for _, row in rows]) if dataset.filters.where else [{}] * len(rows)
    problems = Problems(f"{where}: {table.name}")
    videos = _videos(where, table.parent, dataset, problems)
    items: dict[str, SourceItem] = {}
    for (label, row), values in zip(rows, facts, strict=True):
        stem = str(row.get(_ID) or "").strip()
        if not stem:
            problems.add("rows without an ID", label)
        elif stem in items:
            problems.add("rows with the ID of another one", f"{label} ({stem})")
        elif stem not in videos:
            if dataset.allow_missing_videos:
                left_out["allow_missing_videos"] += 1
            else:
                problems.add("rows whose video is in no tar (or set allow_missing_videos)", f"{label} ({stem})")
        else:
            try:
                captions = prompt if prompt is not None else _captions(row, dataset)
            except CaptionFault as fault:
                problems.add(fault.kind, f"{label}{fault.detail}")
                continue
            items[stem] = SourceItem(
                dataset=name, name=stem, video=videos[stem], captions=prefixed(dataset, captions), facts=values
            )
    known = {str(row.get(_ID) or "").strip() for _, row in rows}
    for stem in sorted(videos.keys() - known):
        problems.add("videos without a row", f"{videos[stem].tar.name}::{videos[stem].name}")
    problems.raise_any()
    if not items:
        raise UsageError(f"{where}: none of the {len(rows)} videos that {table} names is in a tar")
    return list(items.values())


def _table(where: str, path: Path) -> Path:
    tables = [path] if path.is_file() else sorted(path.glob("*.csv"))
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise UsageError(f"{where}: {path} has to hold one CSV; found {found}: set {where}.path to the CSV")
    return tables[0]


def _videos(where: str, folder: Path, dataset: DatasetConfig, problems: Problems) -> dict[str, TarMember]:
    """The videos of all tars by ID."""
    videos: dict[str, TarMember] = {}
    for tar in tars_at(where, folder):
        for member in members_of(where, tar):
            path = PurePosixPath(member.name)
            if path.suffix.lower() not in media_suffixes(dataset):
                continue
            if path.stem in videos:
                first = videos[path.stem]
                problems.add("videos that are there twice", f"{tar.name}::{path} and {first.tar.name}::{first.name}")
            videos[path.stem] = member
    return videos


def _captions(row: dict[str, str], dataset: DatasetConfig) -> dict[str, str]:
    texts = {"brief": (row.get(_BRIEF) or "").strip(), "detailed": (row.get(_DETAILED) or "").strip()}
    texts["brief_detailed"] = f"{texts['brief']} {texts['detailed']}" if all(texts.values()) else ""
    if dataset.captions is None:
        return {"": select(dataset, {"brief_detailed": texts["brief_detailed"]})["brief_detailed"]}
    return select(dataset, texts)
