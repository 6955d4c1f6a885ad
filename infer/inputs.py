"""What to generate: a prompt, a folder of images with captions, or NVIDIA's JSON and JSONL become requests.

Nothing is guessed or skipped: a missing half of a pair, an unknown key or a name used twice is a UsageError
that names the file.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infer.config import InferConfig
from manifests.errors import UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to make.

    name: file name of the video, without suffix. negative_prompt: null means the model's default.
    image, video: what to condition on, at most one; neither is text2world.
    num_latent_conditional_frames: clean latent frames at the start: 0 for text, 1 for an image, 1 or 2 for a
    video (its last 1 or 5 frames). The rest as in InferConfig.
    """

    name: str
    prompt: str
    negative_prompt: str | None = None
    image: Path | None = None
    video: Path | None = None
    num_latent_conditional_frames: int = 0
    seed: int
    guidance: float
    num_steps: int
    num_frames: int
    height: int
    width: int


def read_requests(inputs: str, config: InferConfig) -> list[Request]:
    """Requests from a folder, a `.json` or `.jsonl` file, or else the text itself as one prompt.

    config: what a request does not say itself.
    Text that is one word with a path's separator or a file's suffix is taken for a path, and must exist.
    """
    if not inputs.strip():
        raise UsageError("inputs: empty; give a prompt, a folder, or a .json or .jsonl file")
    default = Request(
        name="video",
        prompt="",
        negative_prompt=config.negative_prompt,
        seed=config.seed,
        guidance=config.guidance,
        num_steps=config.num_steps,
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
    )
    # A prompt may be longer than a file name may be, which stat() would refuse.
    path = Path(inputs) if len(inputs) < 1024 and "\n" not in inputs else None
    if path is not None and _exists(path):
        if path.is_dir():
            return read_folder(path, default)
        readers: dict[str, Callable[[Path, Request], list[Request]]] = {".json": read_json, ".jsonl": read_jsonl}
        if path.suffix.lower() not in readers:
            raise UsageError(f"{path}: inputs are a prompt, a folder, or a .json or .jsonl file")
        return readers[path.suffix.lower()](path, default)
    if not re.search(r"\s", inputs) and re.search(r"[/\\]|\.(jsonl?|txt|mp4|png|jpe?g)$", inputs):
        raise UsageError(f"{inputs}: no such file or folder")
    words = re.findall(r"[a-z0-9]+", inputs.lower())[:8]
    return [replace(default, name="_".join(words)[:64] or default.name, prompt=inputs.strip())]


def read_folder(folder: Path, default: Request) -> list[Request]:
    """One image2world request for each `<stem>.png|.jpg|.jpeg` and its `<stem>.txt` (or `<stem>..txt`).

    Files with other suffixes are not inputs. Sorted by stem.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = _by_stem([p for p in files if p.suffix.lower() in IMAGE_SUFFIXES])
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
            prompt=_read_prompt(texts[stem]),
            image=images[stem],
            num_latent_conditional_frames=1,
        )
        for stem in sorted(images)
    ]


def read_json(path: Path, default: Request) -> list[Request]:
    """Requests from one object or a list of objects in NVIDIA's format; see `Entry`."""
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from error
    entries = content if isinstance(content, list) else [content]
    places = [f"{path}: entry {i}" if len(entries) > 1 else str(path) for i in range(1, len(entries) + 1)]
    return _parse_entries(path, list(zip(places, entries, strict=True)), default)


def read_jsonl(path: Path, default: Request) -> list[Request]:
    """Requests from one object a line; blank lines are passed over."""
    entries = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if line.strip():
            try:
                entries.append((f"{path}: line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}: line {number}: not JSON: {error.msg}") from error
    return _parse_entries(path, entries, default)


class Entry(BaseModel):
    """One object of NVIDIA's inference JSON. Paths are relative to the file it stands in."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    inference_type: Literal["text2world", "image2world", "video2world"] | None = None
    prompt: str | None = None
    prompt_path: str | None = None
    negative_prompt: str | None = None
    input_path: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    guidance: float | None = Field(default=None, ge=0)
    resolution: str | None = Field(default=None, pattern=r"^(\d+,\s*\d+|none)$")
    num_output_frames: int | None = Field(default=None, ge=1)
    num_steps: int | None = Field(default=None, ge=1)
    num_latent_conditional_frames: int | None = Field(default=None, ge=1, le=2)


def _parse_entries(path: Path, entries: Sequence[tuple[str, Any]], default: Request) -> list[Request]:
    if not entries:
        raise UsageError(f"{path}: no inputs in this file")
    requests = [_parse_entry(where, path.parent, entry, default) for where, entry in entries]
    for name, times in Counter(request.name for request in requests).items():
        if times > 1:
            raise UsageError(f"{path}: name {name!r} is used {times} times; each video needs its own")
    return requests


def _parse_entry(where: str, folder: Path, raw: Any, default: Request) -> Request:
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected an object such as {{'name': ..., 'prompt': ...}}")
    entry = _validate(where, raw)
    if re.search(r"[/\\]", entry.name) or entry.name.startswith("."):
        raise UsageError(f"{where}: name {entry.name!r} becomes a file name; leave out '/' and a leading '.'")
    if (entry.prompt is None) == (entry.prompt_path is None):
        raise UsageError(f"{where}: give one of prompt and prompt_path")
    if entry.prompt_path is not None:
        prompt = _read_prompt(_existing(where, "prompt_path", folder / entry.prompt_path))
    else:
        prompt = (entry.prompt or "").strip()
        if not prompt:
            raise UsageError(f"{where}: prompt is empty")
    image, video = _conditioning_input(where, folder, entry)
    most = 2 if video else 1 if image else 0
    clean = entry.num_latent_conditional_frames
    if clean is not None and clean > most:
        raise UsageError(f"{where}: num_latent_conditional_frames = {clean}; this input has at most {most}")
    given: dict[str, Any] = {
        "negative_prompt": entry.negative_prompt,
        "seed": entry.seed,
        "guidance": entry.guidance,
        "num_steps": entry.num_steps,
        "num_frames": entry.num_output_frames,
    }
    if entry.resolution is not None and entry.resolution != "none":
        given["height"], given["width"] = (int(side) for side in entry.resolution.split(","))
    return replace(
        default,
        name=entry.name,
        prompt=prompt,
        image=image,
        video=video,
        num_latent_conditional_frames=most if clean is None else clean,
        **{field: value for field, value in given.items() if value is not None},
    )


def _validate(where: str, raw: dict[str, Any]) -> Entry:
    try:
        return Entry.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Entry.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(Entry.model_fields)}"
            raise UsageError(f"{where}: unknown key {key!r}; {hint}") from error
        if first["type"] == "missing":
            raise UsageError(f"{where}: {key} is missing") from error
        raise UsageError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from error


def _conditioning_input(where: str, folder: Path, entry: Entry) -> tuple[Path | None, Path | None]:
    """(image, video): what input_path names, checked against inference_type."""
    if entry.input_path is None:
        if entry.inference_type in ("image2world", "video2world"):
            raise UsageError(f"{where}: {entry.inference_type} needs input_path")
        return None, None
    if entry.inference_type == "text2world":
        raise UsageError(f"{where}: text2world takes no input_path; remove it or use image2world")
    path = _existing(where, "input_path", folder / entry.input_path)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        known = " ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        raise UsageError(f"{where}: input_path {path} is neither image nor video; known suffixes: {known}")
    is_image = suffix in IMAGE_SUFFIXES
    found = "image2world" if is_image else "video2world"
    if entry.inference_type not in (None, found):
        kind = "an image" if is_image else "a video"
        raise UsageError(f"{where}: {entry.inference_type}, but input_path {path} is {kind}; use {found}")
    return (path, None) if is_image else (None, path)


def _existing(where: str, key: str, path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"{where}: {key} {path}: no such file")
    return path


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


def _read_prompt(path: Path) -> str:
    prompt = _read_text(path).strip()
    if not prompt:
        raise UsageError(f"{path}: the caption is empty")
    return prompt


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{path}: cannot read this file: {reason}") from error
