"""`<stem>.mp4` beside `<stem>.txt` in one folder; `<stem>.png` or `.jpg` with `media = "images"`.

The layout of the guides' evaluation sets, some of which have `<stem>..txt`; `<stem>.json` comes before a text. Files in
subfolders and names that begin with a dot are not looked at.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from encode.caption_files import Captions
from encode.config import DatasetConfig
from encode.sources import SourceItem, prompt_of
from encode.sources.folder import items_of, read_captions, videos_by_stem
from manifests.errors import UsageError


def read(name: str, dataset: DatasetConfig, left_out: Counter[str]) -> list[SourceItem]:
    """Items sorted by name. With `prompt`, no captions are read. Raises UsageError as the layout `folder` does."""
    where = f"data.datasets.{name}"
    root = Path(dataset.path)
    if not root.is_dir():
        raise UsageError(f"{where}: there is no folder {root}: correct {where}.path")
    files = sorted(path for path in root.iterdir() if path.is_file() and not path.name.startswith("."))
    videos = videos_by_stem(where, root, files, dataset)
    prompt = prompt_of(where, dataset)
    if prompt is not None:
        return items_of(name, dataset, videos, dict.fromkeys(videos, Captions(prompt)))
    texts = [path for suffix in (".json", ".txt") for path in files if path.suffix == suffix]
    captions = read_captions(where, root, texts, videos, dataset, left_out, "{}.txt")
    return items_of(name, dataset, videos, captions)
