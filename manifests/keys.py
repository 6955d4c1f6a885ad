"""Content addresses: a key is the hash of everything that determines an entry's bytes, and of nothing else.

Paths, worker counts, shard sizes and training settings never enter a key, so moving data or changing the
trainer invalidates nothing. Keys are 40 hex digits (160 bits of SHA-256) and safe as WebDataset names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
KEY_DIGITS = 40
_CHUNK_BYTES = 1 << 20


def digest(value: Any) -> str:
    """Hash a JSON-like value: equal values give equal digests on every machine.

    Floats are written with Python's shortest exact form, mappings sorted by key. NaN and other types raise
    `ValueError` or `TypeError`.
    """
    return hashlib.sha256(_text(value).encode()).hexdigest()[:KEY_DIGITS]


def table_digest(head: Any, columns: Iterable[Iterable[Sequence[Any]]]) -> str:
    """Return `digest([head, columns])`, where each column is given piece by piece and never held whole."""
    state = hashlib.sha256(f"[{_text(head)},[".encode())
    for number, pieces in enumerate(columns):
        state.update(b",[" if number else b"[")
        written = False
        for piece in pieces:
            if len(piece):
                state.update(("," if written else "").encode() + _text(piece)[1:-1].encode())
                written = True
        state.update(b"]")
    state.update(b"]]")
    return state.hexdigest()[:KEY_DIGITS]


_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def file_digest(path: Path, offset: int = 0, size: int | None = None) -> str:
    """Hash a file's bytes: all of them, or `size` from `offset` on. `OSError` if the file ends before."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        while chunk := file.read(_CHUNK_BYTES if size is None else min(size, _CHUNK_BYTES)):
            state.update(chunk)
            size = None if size is None else size - len(chunk)
    if size:
        raise OSError(f"ends {size} bytes too early")
    return state.hexdigest()[:KEY_DIGITS]


def checksum(payload: bytes | memoryview) -> str:
    """SHA-256 of an entry's bytes, as 64 hex digits."""
    return hashlib.sha256(payload).hexdigest()


def latents_keys(
    *,
    source_hash: str,
    starts: Iterable[int],
    num_frames: int,
    fps: float | None,
    height: int,
    width: int,
    fingerprint: str,
    clip: tuple[float, float | None] | None = None,
) -> list[str]:
    """Name the latents of some windows of one video.

    starts: first frames, counted at `fps` (source frames where `fps` is None) from the start of `clip`.
    clip: (start, end) seconds of the part of the source that windows are taken from; None is all of it.
    fingerprint: digest of the producer's parts (VAE weights, normalisation, dtype, preprocessing).
    """
    fields = {
        "kind": "latents",
        "source": source_hash,
        "clip": clip,
        "num_frames": num_frames,
        "fps": None if fps is None else float(fps),
        "size": [height, width],
        "fingerprint": fingerprint,
        "format": FORMAT_VERSION,
    }
    # "start" sorts last, so windows differ in the tail of the hashed text alone: the rest is hashed once.
    head = hashlib.sha256(_text(fields)[:-1].encode())
    keys = []
    for start in starts:
        state = head.copy()
        state.update(f',"start":{start:d}}}'.encode())
        keys.append(state.hexdigest()[:KEY_DIGITS])
    return keys


def latents_key(*, start: int, **window: Any) -> str:
    """Name the latents of one window; the arguments are those of `latents_keys`."""
    return latents_keys(starts=[start], **window)[0]


def hint_key(*, hint: str, parameters: str, **window: Any) -> str:
    """Name a hint of one window; the other arguments are those of `latents_key`, of the video the hint is made from.

    hint: its kind. parameters: what it is made with, as `manifests.hints.parameters_text` writes it.
    """
    start = window.pop("start")
    window["fps"] = None if window["fps"] is None else float(window["fps"])
    window["clip"] = window.get("clip") and list(window["clip"])
    fields = {"kind": "hint", "hint": hint, "parameters": parameters, "start": start, "format": FORMAT_VERSION}
    return digest(fields | {"window": window})


def context_key(*, caption: str | None, fingerprint: str) -> str:
    """Name the context of one caption; `caption=None` is the null context (dropped text)."""
    return digest({"kind": "context", "caption": caption, "fingerprint": fingerprint, "format": FORMAT_VERSION})


def captions_key(contexts: Mapping[str, str]) -> str:
    """Name several captions of one video by the key of each one's context, by name."""
    return digest({"captions": dict(contexts)})


def hints_key(hints: Mapping[str, str]) -> str:
    """Name the hints of one window by the key of each one, by name."""
    return digest({"hints": dict(hints)})


def sample_id(*, dataset: str, latents: str, context: str, hints: str | None = None) -> str:
    """Name a training sample by what it is made of.

    context: its context's key, or the `captions_key` of several. hints: the `hints_key`, where it has hints.
    """
    # `digest` of a mapping with these names, written out: there are millions.
    named = "" if hints is None else f',"hints":{_text(hints)}'
    text = f'{{"context":{_text(context)},"dataset":{_text(dataset)}{named},"latents":{_text(latents)}}}'
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash the parts that describe a producer of entries."""
    return digest(dict(parts))
