"""What to generate: a prompt, a folder of images with captions, or a JSON, JSONL or YAML file become requests.

Nothing is guessed or skipped: a missing half of a pair, an unknown key or a name used twice is a UsageError
that names the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from infer.config import InferConfig
from infer.documents import SUFFIXES
from infer.entries import VIDEO_SUFFIXES, Parse, read_entries, read_prompt
from infer.request import Request, default_request
from manifests.errors import UsageError

FOLDER_SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMS = "a prompt, a folder, or a .json, .jsonl or .yaml file"


def read_requests(inputs: str, config: InferConfig, parse: Parse | None = None) -> list[Request]:
    """Requests from a folder, a `.json`, `.jsonl` or `.yaml` file, or else the text itself as one prompt.

    parse: the family's own form of an object of a file.
    config: what a request does not say itself; its `ground_truth` folder gives each its video to compare with.
    Text that is one word with a path's separator or a file's suffix is taken for a path, and must exist.
    """
    if not inputs.strip():
        raise UsageError(f"inputs: empty; give {_FORMS}")
    requests = _read(inputs, default_request(config), parse)
    check_names(requests, inputs)
    if config.ground_truth is not None:
        requests = _with_ground_truth(requests, Path(config.ground_truth))
    return requests


def check_names(requests: Sequence[Request], where: str) -> None:
    """Raise UsageError if two requests share a name, which names their videos."""
    for name, times in Counter(request.name for request in requests).items():
        if times > 1:
            raise UsageError(f"{where}: name {name!r} is used {times} times; each video needs its own")


def _read(inputs: str, default: Request, parse: Parse | None) -> list[Request]:
    # A prompt may be longer than a file name may be, which stat() would refuse.
    path = Path(inputs) if len(inputs) < 1024 and "\n" not in inputs else None
    if path is not None and _exists(path):
        if path.is_dir():
            return read_folder(path, default)
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{path}: inputs are {_FORMS}")
        return read_entries(path, default, parse)
    if not re.search(r"\s", inputs) and re.search(r"[/\\]|\.(jsonl?|ya?ml|txt|mp4|png|jpe?g)$", inputs):
        raise UsageError(f"{inputs}: no such file or folder")
    words = re.findall(r"[^\W_]+", inputs.lower())[:8]
    name = "_".join(words).encode()[:64].decode(errors="ignore")
    return [replace(default, name=name or default.name, prompt=inputs.strip())]


def read_folder(folder: Path, default: Request) -> list[Request]:
    """One image2world request for each `<stem>.png|.jpg|.jpeg` and its `<stem>.txt` (or `<stem>..txt`).

    Files with other suffixes are not inputs. Sorted by stem.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = _by_stem([p for p in files if p.suffix.lower() in FOLDER_SUFFIXES])
    texts = _by_stem([p for p in files if p.suffix.lower() == ".txt"])
    for stem in sorted(images.keys() | texts.keys()):
        if stem not in texts:
            raise UsageError(f"{images[stem]}: no caption; add {stem}.txt beside it")
        if stem not in images:
            raise UsageError(f"{texts[stem]}: no image; add {stem}.png or {stem}.jpg beside it")
    if not images:
        raise UsageError(f"{folder}: no inputs; expected <stem>.png or <stem>.jpg with <stem>.txt")
    return [
        replace(
            default,
            name=stem,
            prompt=read_prompt(texts[stem]),
            image=images[stem],
            num_latent_conditional_frames=1,
        )
        for stem in sorted(images)
    ]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a prompt whose first part is longer than a file name may be
        return False


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.stem.rstrip(".")  # `<stem>..txt` occurs in published evaluation sets
        if stem in found:
            raise UsageError(f"{path}: {found[stem].name} has the same stem; keep one of them")
        found[stem] = path
    return found


def _with_ground_truth(requests: Sequence[Request], folder: Path) -> list[Request]:
    """Each request with the video of its name in `folder`; one that names its own keeps it."""
    if not folder.is_dir():
        raise UsageError(f"infer.ground_truth: {folder}: no such folder")
    videos = _by_stem(sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES))
    if missing := [r.name for r in requests if r.ground_truth is None and r.name not in videos]:
        raise UsageError(f"infer.ground_truth: {folder}: no video named {missing[0]} ({len(missing)} missing)")
    return [replace(r, ground_truth=r.ground_truth or videos[r.name]) for r in requests]
