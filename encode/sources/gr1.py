"""GR1's `metadata.csv`: a line `video,prompt` a video, split on the first comma, quotes around the prompt stripped.

Videos lie beside the file as it names them, or in `videos/`. The quotes are plain: commas and further quotes are part
of the prompt, a prompt is one line. The guides put "The robot arm is performing a task. " before each
(`prompt_prefix`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from encode.config import DatasetConfig
from encode.sources import Problems, SourceItem, media_suffixes, prefixed, prompt_of
from encode.sources.folder import files_below
from encode.tables import read_text
from manifests.errors import UsageError

_TABLE = "metadata.csv"


def read(name: str, dataset: DatasetConfig, left_out: Counter[str]) -> list[SourceItem]:
    """Items in the order of the lines. With `prompt`, the file's prompts are not used.

    Raises UsageError for: no `metadata.csv`, another first line than `video,prompt`, a line without a comma or a
    prompt, a video that is named twice or in two places, a video without a line, a line without its video (unless
    `allow_missing_videos`).
    """
    where = f"data.datasets.{name}"
    root = Path(dataset.path)
    table = root / _TABLE
    if not table.is_file():
        raise UsageError(f"{where}: there is no table {table}: correct {where}.path")
    header, *lines = read_text(f"{where}: {table}", table).splitlines() or [""]
    if [column.strip().strip('"') for column in header.split(",")] != ["video", "prompt"]:
        raise UsageError(f'{where}: {table} begins with {header[:40]!r}, not with video,prompt; try layout = "table"')
    prompt = prompt_of(where, dataset)
    problems = Problems(f"{where}: {_TABLE}")
    items: dict[Path, SourceItem] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        text, comma, caption = line.partition(",")
        caption = caption.strip()
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = caption[1:-1].strip()
        text = text.strip().strip('"').strip()
        if not comma or not text:
            problems.add("lines that are not video,prompt", f"line {number}")
            continue
        if not caption and prompt is None:
            problems.add("lines without a prompt", f"line {number}")
            continue
        places = _places(root, text)
        if not places:
            if dataset.allow_missing_videos:
                left_out["allow_missing_videos"] += 1
            else:
                problems.add("lines whose video does not exist", f"line {number} ({text})")
        elif len(places) > 1:
            problems.add("lines whose video is in two places", f"line {number} ({', '.join(map(str, places))})")
        elif places[0] in items:
            problems.add("lines of a video that has one", f"line {number} ({text})")
        else:
            captions = prefixed(dataset, prompt or {"": caption})
            stem = str(Path(text).with_suffix(""))
            items[places[0]] = SourceItem(dataset=name, name=stem, video=places[0], captions=captions)
    for video in sorted(files_below(root)):
        if video.suffix.lower() in media_suffixes(dataset) and video not in items:
            problems.add("videos without a line", str(video.relative_to(root)))
    problems.raise_any()
    if not items:
        raise UsageError(f"{where}: {table} names no video")
    return list(items.values())


def _places(root: Path, text: str) -> list[Path]:
    """Where a video is that a line names: beside the table, or by name in `videos/`."""
    places = dict.fromkeys([root / text, root / "videos" / text, root / "videos" / Path(text).name])
    found = [place for place in places if place.is_file()]
    return [place for place in found if place.resolve() == found[0].resolve()][:1] + [
        place for place in found if place.resolve() != found[0].resolve()
    ]
