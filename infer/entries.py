"""NVIDIA's inference entries become requests: one object of a JSON, JSONL or YAML file each.

Nothing is guessed: an unknown key, a path that is not there or two prompts are a UsageError that names the place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infer.documents import read_documents, read_text
from infer.request import Request
from manifests.errors import UsageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
MOST_NAME_BYTES = 200


Parse: TypeAlias = "Callable[[str, Path, dict[str, Any], Request], Request]"
"""(where, the file's folder, an object, what it does not say itself) -> its request."""


def read_entries(path: Path, default: Request, parse: Parse | None = None) -> list[Request]:
    """The requests of a file; `infer.documents` says its forms, `Entry` an object's keys, or the family's `parse`."""
    documents = read_documents(path)
    if not documents:
        raise UsageError(f"{path}: no inputs in this file")
    for where, value in documents:
        _check_object(where, value)
    return [(parse or _parse_entry)(where, path.parent, value, default) for where, value in documents]


class Entry(BaseModel):
    """One object of NVIDIA's inference JSON. Paths are relative to the file it stands in.

    enable_autoregressive: false makes a video of any length at once. num_latent_conditional_frames and ground_truth
    are ours.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    inference_type: Literal["text2world", "image2world", "video2world"] | None = None
    prompt: str | None = None
    prompt_path: str | None = None
    negative_prompt: str | None = None
    input_path: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    resolution: str | None = Field(default=None, pattern=r"^(\d+,\s*\d+|none)$")
    num_output_frames: int | None = Field(default=None, ge=1)
    num_steps: int | None = Field(default=None, ge=1)
    enable_autoregressive: bool | None = None
    chunk_size: int | None = Field(default=None, ge=1)
    chunk_overlap: int | None = Field(default=None, ge=1)
    num_latent_conditional_frames: int | None = Field(default=None, ge=1, le=2)
    ground_truth: str | None = None


def _check_object(where: str, raw: Any) -> None:
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected an object such as {{'name': ..., 'prompt': ...}}")
    for key in raw:
        if not isinstance(key, str):
            raise UsageError(f"{where}: key {key!r} is not text; write it in quotes")


def check_name(where: str, name: str) -> None:
    """Raise UsageError unless an entry's name can be a file's."""
    if re.search(r"[/\\\x00-\x1f\x7f]", name) or name.startswith("."):
        raise UsageError(
            f"{where}: name {name!r} becomes a file name; leave out '/', control characters and a leading '.'"
        )
    if len(name.encode()) > MOST_NAME_BYTES:
        raise UsageError(f"{where}: name {name[:40]!r}... becomes a file name; {MOST_NAME_BYTES} bytes at most")


def prompt_of(where: str, folder: Path, prompt: str | None, prompt_path: str | None) -> str:
    """An entry's prompt, from one of the two places it may stand in."""
    if (prompt is None) == (prompt_path is None):
        raise UsageError(f"{where}: give one of prompt and prompt_path")
    if prompt_path is not None:
        return read_prompt(existing(where, "prompt_path", folder / prompt_path))
    if not (prompt or "").strip():
        raise UsageError(f"{where}: prompt is empty")
    return (prompt or "").strip()


def _parse_entry(where: str, folder: Path, raw: dict[str, Any], default: Request) -> Request:
    entry = validate(where, raw, Entry)
    check_name(where, entry.name)
    prompt = prompt_of(where, folder, entry.prompt, entry.prompt_path)
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
        "chunk_frames": entry.chunk_size,
        "chunk_overlap": entry.chunk_overlap,
    }
    if entry.ground_truth is not None:
        given["ground_truth"] = existing(where, "ground_truth", folder / entry.ground_truth)
    if entry.resolution is not None and entry.resolution != "none":
        given["height"], given["width"] = (int(side) for side in entry.resolution.split(","))
    if entry.enable_autoregressive is False:
        if entry.chunk_size is not None or entry.chunk_overlap is not None:
            raise UsageError(f"{where}: enable_autoregressive is false; remove chunk_size and chunk_overlap")
        default = replace(default, chunk_frames=None)
    return replace(
        default,
        name=entry.name,
        prompt=prompt,
        image=image,
        video=video,
        num_latent_conditional_frames=most if clean is None else clean,
        **{field: value for field, value in given.items() if value is not None},
    )


_Model = TypeVar("_Model", bound=BaseModel)


def validate(where: str, raw: dict[str, Any], kind: type[_Model], instead: Mapping[str, str] | None = None) -> _Model:
    """An object as `kind`; UsageError names its first wrong key, by dotted path.

    instead: what to do without a key that others have, by its name.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            *parents, last = (str(part) for part in first["loc"])
            known = _fields(kind, parents)
            near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            hint = (instead or {}).get(last, hint)
            raise UsageError(f"{where}: unknown key {key!r}; {hint}") from error
        if first["type"] == "missing":
            raise UsageError(f"{where}: {key} is missing") from error
        raise UsageError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from error


def _fields(kind: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """The keys of an object, or of one inside it."""
    for name in parents:
        inside = [kind.model_fields[name].annotation, *get_args(kind.model_fields[name].annotation)]
        [kind] = [one for one in inside if isinstance(one, type) and issubclass(one, BaseModel)]
    return list(kind.model_fields)


def _conditioning_input(where: str, folder: Path, entry: Entry) -> tuple[Path | None, Path | None]:
    """(image, video): what input_path names, checked against inference_type."""
    if entry.input_path is None:
        if entry.inference_type in ("image2world", "video2world"):
            raise UsageError(f"{where}: {entry.inference_type} needs input_path")
        return None, None
    if entry.inference_type == "text2world":
        raise UsageError(f"{where}: text2world takes no input_path; remove it or use image2world")
    path = existing(where, "input_path", folder / entry.input_path)
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


def read_prompt(path: Path) -> str:
    """A caption file's text; an empty one is an error."""
    prompt = read_text(path).strip()
    if not prompt:
        raise UsageError(f"{path}: the caption is empty")
    return prompt


def existing(where: str, key: str, path: Path) -> Path:
    """The path of a file an entry names; UsageError if there is none."""
    if not path.is_file():
        raise UsageError(f"{where}: {key} {path}: no such file")
    return path
