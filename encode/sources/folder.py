"""`videos/*.mp4` with one caption a video in `metas/<stem>.txt`.

The videos may lie in subfolders of `videos`; captions are found by stem alone, so stems are unique. Names that
begin with a dot are not looked at. Captions are UTF-8 and lose the white space around them.
"""

from __future__ import annotations

import os
from pathlib import Path

from encode.config import DatasetConfig
from encode.sources import VIDEO_SUFFIXES, Problems, SourceItem, prompt_of
from manifests.errors import UsageError


def read(name: str, dataset: DatasetConfig) -> list[SourceItem]:
    """Items sorted by the video's path below `videos`. With `prompt`, `metas` is not read.

    Raises UsageError for: no `videos` folder or no video in it, equal stems, a video without a caption, a
    caption without a video, a caption that is empty or not UTF-8.
    """
    where = f"data.datasets.{name}"
    root = Path(dataset.path)
    videos = _videos_by_stem(where, root / "videos")
    if dataset.prompt is not None:
        captions = dict.fromkeys(videos, prompt_of(where, dataset.prompt))
    else:
        captions = _captions(where, root, videos)
    return [
        SourceItem(dataset=name, name=stem, video=video, caption=dataset.prompt_prefix + captions[stem])
        for stem, video in videos.items()
    ]


def _videos_by_stem(where: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"{where}: there is no folder {folder}: put the videos there, or correct {where}.path")
    found = sorted(path for path in _files(folder) if path.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise UsageError(f"{where}: {folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    problems = Problems(where)
    videos: dict[str, Path] = {}
    for video in found:
        if video.stem in videos:
            first = videos[video.stem].relative_to(folder)
            problems.add(
                "videos with the stem of another one (rename them)", f"{video.relative_to(folder)} and {first}"
            )
        videos.setdefault(video.stem, video)
    problems.raise_any()
    return videos


def _captions(where: str, root: Path, videos: dict[str, Path]) -> dict[str, str]:
    metas = root / "metas"
    if not metas.is_dir():
        raise UsageError(f"{where}: there is no folder {metas}: write one metas/<stem>.txt a video, or set prompt")
    problems = Problems(where)
    captions: dict[str, str] = {}
    present = {path.stem for path in metas.iterdir() if path.suffix == ".txt" and not path.name.startswith(".")}
    for stem, video in videos.items():
        file = metas / f"{stem}.txt"
        if stem not in present:
            problems.add("videos without a caption", f"{video.relative_to(root)} (expected metas/{file.name})")
            continue
        try:
            caption = file.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            problems.add("captions that are not UTF-8", f"metas/{file.name}")
            continue
        if not caption:
            problems.add("empty captions", f"metas/{file.name}")
        captions[stem] = caption
    for stem in sorted(present - videos.keys()):
        problems.add("captions without a video", f"metas/{stem}.txt")
    problems.raise_any()
    return captions


def _files(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return files
