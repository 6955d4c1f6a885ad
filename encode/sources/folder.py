"""`videos/*.mp4` with captions in `captions/<stem>.json` or `metas/<stem>.txt`; `images/*.jpg` with `media = "images"`.

The layout of NVIDIA's NeMo, sports, robotics and Transfer guides. The videos may lie in subfolders; captions are found
by stem alone, so stems are unique. A video's JSON file comes before its text file. Text may be called `<stem>..txt`, as
it is in some public sets. Names that begin with a dot are not looked at. The forms of JSON: `encode.caption_files`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from encode.caption_files import CaptionFault, Captions, parse_json, parse_text
from encode.config import DatasetConfig
from encode.sources import Problems, SourceItem, media_suffixes, prefixed, prompt_of
from manifests.errors import UsageError

_PARSERS = {".json": parse_json, ".txt": parse_text}


def read(name: str, dataset: DatasetConfig, left_out: Counter[str]) -> list[SourceItem]:
    """Items sorted by the video's path below `videos`. With `prompt`, no captions are read.

    Raises UsageError for: no `videos` folder or no video in it, equal stems, a video without a caption, a caption
    without a video (unless `allow_missing_videos`), a caption that is empty, not UTF-8 or of no known form.
    """
    where = f"data.datasets.{name}"
    root = Path(dataset.path)
    folder = root / dataset.media
    if not folder.is_dir():
        images = dataset.media == "videos" and (root / "images").is_dir()
        hint = f"put the {dataset.media} there, or correct {where}.path{', or set media to images' if images else ''}"
        raise UsageError(f"{where}: there is no folder {folder}: {hint}")
    videos = videos_by_stem(where, folder, files_below(folder), dataset)
    prompt = prompt_of(where, dataset)
    if prompt is not None:
        captions = dict.fromkeys(videos, Captions(prompt))
    else:
        captions = _captions(where, root, videos, dataset, left_out)
    return items_of(name, dataset, videos, captions)


def items_of(
    name: str, dataset: DatasetConfig, videos: dict[str, Path], captions: dict[str, Captions]
) -> list[SourceItem]:
    """An item a video."""
    return [
        SourceItem(
            dataset=name,
            name=stem,
            video=video,
            captions=prefixed(dataset, captions[stem].texts),
            facts=captions[stem].facts,
        )
        for stem, video in videos.items()
    ]


def videos_by_stem(where: str, folder: Path, files: list[Path], dataset: DatasetConfig) -> dict[str, Path]:
    """The dataset's videos among files below a folder, sorted by path."""
    suffixes = media_suffixes(dataset)
    found = sorted(path for path in files if path.suffix.lower() in suffixes)
    if not found:
        raise UsageError(f"{where}: {folder} holds no {dataset.media[:-1]} ({', '.join(sorted(suffixes))})")
    problems = Problems(where)
    videos: dict[str, Path] = {}
    for video in found:
        if video.stem in videos:
            first = videos[video.stem].relative_to(folder)
            example = f"{video.relative_to(folder)} and {first}"
            problems.add(f"{dataset.media} with the stem of another one (rename them)", example)
        videos.setdefault(video.stem, video)
    problems.raise_any()
    return videos


def read_captions(
    where: str,
    root: Path,
    files: list[Path],
    videos: dict[str, Path],
    dataset: DatasetConfig,
    left_out: Counter[str],
    expected: str,
) -> dict[str, Captions]:
    """Captions of videos by stem. files: of captions, those that come first win over later ones of another suffix.

    expected: pattern of the file a video without a caption lacks, with `{}` for its stem.
    """
    problems = Problems(where)
    captions: dict[str, Captions] = {}
    of_stem: dict[str, Path] = {}
    for file in files:
        stem = _stem_of(file, videos)
        shown = file.relative_to(root)
        if stem not in videos:
            if dataset.allow_missing_videos:
                left_out["allow_missing_videos"] += 1
            else:
                problems.add("captions without a video", str(shown))
            continue
        if stem in of_stem:
            if of_stem[stem].suffix == file.suffix:
                problems.add("captions of one video in two files", f"{of_stem[stem].relative_to(root)} and {shown}")
            continue
        of_stem[stem] = file
        try:
            captions[stem] = _PARSERS[file.suffix](file.read_bytes(), dataset)
        except CaptionFault as fault:
            problems.add(fault.kind, f"{shown}{fault.detail}")
    for stem in sorted(videos.keys() - of_stem.keys()):
        example = f"{videos[stem].relative_to(root)} (expected {expected.format(stem)})"
        problems.add(f"{dataset.media} without a caption", example)
    problems.raise_any()
    return captions


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, links followed, without names that begin with a dot."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return files


def _captions(
    where: str, root: Path, videos: dict[str, Path], dataset: DatasetConfig, left_out: Counter[str]
) -> dict[str, Captions]:
    json_folder, text_folder = root / "captions", root / "metas"
    if not (json_folder.is_dir() or text_folder.is_dir()):
        raise UsageError(
            f"{where}: there is no folder {text_folder} and none {json_folder}: write one metas/<stem>.txt or "
            "captions/<stem>.json a video, or set prompt"
        )
    expected = "metas/{}.txt" if text_folder.is_dir() else "captions/{}.json"
    files = [*_of_suffix(json_folder, ".json"), *_of_suffix(text_folder, ".txt")]
    return read_captions(where, root, files, videos, dataset, left_out, expected)


def _of_suffix(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith("."))


def _stem_of(file: Path, videos: Collection[str]) -> str:
    """The stem of the file's video: `x` for `x.txt` and for `x..txt`."""
    return file.stem if file.stem in videos else file.stem.removesuffix(".")
