"""Readers of public data layouts, one file a layout.

A layout is a module of this package with `read(name, dataset) -> list[SourceItem]`; `DatasetConfig.layout` is the
module's name. Adding a layout adds a file here and its name to `DatasetConfig.layout`, nothing else.

Readers look at names and text only; no video is opened. Everything wrong with a dataset is reported at once, in
one line, before any work starts.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from encode.config import DataConfig
from manifests.errors import UsageError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi"})
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceItem:
    """One video, or one part of it, with its caption.

    dataset: key of the dataset in `data.datasets`.
    name: the video as the dataset names it, without folder of the dataset and without suffix.
    video: path of an existing file. caption: not empty, `prompt_prefix` included.
    start, end: the part of the video to use, seconds from its first presented frame, end exclusive; None means
        from the beginning, to the end.
    """

    dataset: str
    name: str
    video: Path
    caption: str
    start: float | None = None
    end: float | None = None


def read_sources(data: DataConfig) -> list[SourceItem]:
    """Every item of every dataset, in the order of the recipe, sorted or in table order within a dataset.

    Raises UsageError, one line, when there is no dataset or a dataset has any problem.
    """
    if not data.datasets:
        raise UsageError("data.datasets is empty: name at least one dataset with a layout and a path")
    items: list[SourceItem] = []
    for name, dataset in data.datasets.items():
        layout = importlib.import_module(f"encode.sources.{dataset.layout}")
        items += layout.read(name, dataset)
    return items


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


def prompt_of(where: str, prompt: str) -> str:
    """`DatasetConfig.prompt`, checked."""
    if not prompt.strip():
        raise UsageError(f"{where}.prompt is empty: write the caption, or remove it to read one a video")
    return prompt
