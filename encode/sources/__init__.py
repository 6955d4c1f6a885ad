"""Readers of public data layouts, one file a layout.

A layout is a module of this package with `read(name, dataset, left_out) -> list[SourceItem]`; `DatasetConfig.layout`
is the module's name. Adding a layout adds a file here and its name to `encode.config.Layout`, nothing else.

Readers look at names and text only; no video is opened. Everything wrong with a dataset is reported at once, in
one line, before any work starts. What a dataset's settings leave out is counted in `left_out`, by setting.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from encode.config import DataConfig, DatasetConfig
from encode.files import VideoFile
from manifests.errors import UsageError
from manifests.image_context import IMAGE, SUFFIXES, fault_of_file
from manifests.text import is_utf8

_SUFFIXES = {
    "videos": frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi"}),
    "images": frozenset({".jpg", ".jpeg", ".png"}),
}
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceItem:
    """One video, or one part of it, with its captions.

    dataset: key of the dataset in `data.datasets`.
    name: the video as the dataset names it, without folder of the dataset and without suffix.
    video: an existing file, or a member of a tar.
    captions: not empty, `prompt_prefix` included, by name; a single caption that has no name is under "".
    start, end: the part of the video to use, seconds from its first presented frame, end exclusive; None means
        from the beginning, to the end.
    weight: how often it is drawn relative to the others of the dataset; None is 1.
    facts: further values the dataset has of it, for `filters.where`.
    hints: its control videos that are given, by kind; also its image context.
    """

    dataset: str
    name: str
    video: VideoFile
    captions: Mapping[str, str]
    start: float | None = None
    end: float | None = None
    weight: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """What the datasets of a recipe name. left_out: by dataset, then by the setting that left it out."""

    items: list[SourceItem]
    left_out: dict[str, Counter[str]]


def read_sources(data: DataConfig) -> Sources:
    """Every item of every dataset, in the order of the recipe, sorted or in table order within a dataset.

    Raises UsageError, one line, when there is no dataset or a dataset has any problem.
    """
    if not data.datasets:
        raise UsageError("data.datasets is empty: name at least one dataset with a layout and a path")
    found = Sources([], {})
    for name, dataset in data.datasets.items():
        layout = importlib.import_module(f"encode.sources.{dataset.layout}")
        counts = found.left_out[name] = Counter()
        items = layout.read(name, dataset, counts)
        problems = Problems(f"data.datasets.{name}")
        for item in items:
            if not all(map(is_utf8, item.captions.values())):
                problems.add("captions with half a character (a broken \\uD800 escape)", f"{item.name!a}")
        problems.raise_any()
        found.items.extend(items)
    return found


class Problems:
    """What is wrong with a dataset, collected by kind and raised as one line."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        """kind: what is wrong with the things counted, such as `videos without a caption`."""
        self._found.setdefault(kind, []).append(example)

    def raise_any(self) -> None:
        if not self._found:
            return
        parts = []
        for kind, examples in self._found.items():
            shown = ", ".join(examples[:_EXAMPLES])
            more = len(examples) - _EXAMPLES
            parts.append(f"{len(examples)} {kind}: {shown}" + (f" and {more} more" if more > 0 else ""))
        raise UsageError(f"{self._where}: " + "; ".join(parts))


def with_hint_files(data: DataConfig, items: Sequence[SourceItem], kinds: Sequence[str]) -> list[SourceItem]:
    """The items with their given hints of these kinds: `<kind>/<name>` of the same name as the video.

    Control videos are MP4 or alike, image contexts `.npy` or `.safetensors`. Raises UsageError, one line a dataset,
    that names the videos which lack one.
    """
    found = []
    problems = {name: Problems(f"data.datasets.{name}") for name in data.datasets}
    owners: dict[Path, VideoFile] = {}
    for item in items:
        problem = problems[item.dataset]
        hints: dict[str, Path] = {}
        for kind in kinds:
            base = hints_folder(data.datasets[item.dataset]) / kind / PurePosixPath(item.name).name
            suffixes = SUFFIXES if kind == IMAGE else sorted(_SUFFIXES["videos"])
            label = "image context" if kind == IMAGE else f"{kind} video"
            beside = [base.with_name(base.name + suffix) for suffix in suffixes]
            expected = [item.hints[kind]] if kind in item.hints else beside
            there = [path for path in expected if path.is_file()]
            if not there:
                name = expected[0] if kind in item.hints else f"{base}{'.npy' if kind == IMAGE else '.mp4'}"
                remedy = "" if kind == IMAGE else f" (`latentline encode --make {kind}` makes them)"
                problem.add(f"videos without {_article(label)}{remedy}", f"{item.name} (expected {name})")
            elif len(there) > 1:
                problem.add(f"videos with two {label}s", f"{there[0]} and {there[1].name}")
            elif kind != IMAGE and owners.setdefault(there[0], item.video) != item.video:
                problem.add(f"{label}s of two different videos", f"{there[0]}")
            else:
                hints[kind] = there[0]
        found.append(replace(item, hints=hints))
    for problem in problems.values():
        problem.raise_any()
    return found


def check_image_contexts(items: Iterable[SourceItem], shape: tuple[int, int]) -> None:
    """Raise UsageError for files that hold no image context of this shape."""
    problems = Problems("encode.hints.image_context")
    for path in dict.fromkeys(item.hints[IMAGE] for item in items):
        if fault := fault_of_file(path, shape):
            problems.add("files that are no image context", f"{path} ({fault})")
    problems.raise_any()


def _article(label: str) -> str:
    return f"{'an' if label.startswith('image') else 'a'} {label}"


def hints_folder(dataset: DatasetConfig) -> Path:
    """The folder with a folder of control videos for each kind."""
    if dataset.hints_path is not None:
        return Path(dataset.hints_path)
    path = Path(dataset.path)
    return path.parent if path.is_file() else path


def media_suffixes(dataset: DatasetConfig) -> frozenset[str]:
    """Suffixes, lower case, of the files that are the dataset's videos."""
    return _SUFFIXES[dataset.media]


def prompt_of(where: str, dataset: DatasetConfig) -> dict[str, str] | None:
    """`DatasetConfig.prompt`, checked, as the captions of every video; None where videos have their own."""
    if dataset.prompt is None:
        return None
    if not dataset.prompt.strip():
        raise UsageError(f"{where}.prompt is empty: write the caption, or remove it to read one a video")
    return {"": dataset.prompt}


def prefixed(dataset: DatasetConfig, captions: Mapping[str, str]) -> dict[str, str]:
    """Captions with `DatasetConfig.prompt_prefix`."""
    return {name: dataset.prompt_prefix + text for name, text in captions.items()}
