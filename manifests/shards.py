"""Shards: stock, uncompressed WebDataset tars of safetensors entries, byte-reproducible, read by offset.

A shard holds `<key>.safetensors` and `<key>.json` for each entry, all with mtime 0, so any WebDataset reader
can iterate it. We read members by the offset and size their manifest gives and check the SHA-256 of every
payload: a tar reader notices neither a flipped bit nor a tar cut at a member boundary.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from webdataset import TarWriter

from manifests.errors import CorruptError
from manifests.keys import checksum
from manifests.places import Location
from manifests.store import Store

_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Entry:
    """One entry before it is written: its tensors by name, and the facts kept beside them as JSON."""

    key: str
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    """Where an entry landed inside a shard, and its first tensor's shape and dtype."""

    key: str
    offset: int
    size: int
    checksum: str
    shape: tuple[int, ...]
    dtype: str


def pack(entries: Iterable[Entry]) -> tuple[bytes, list[Member]]:
    """Build a shard: the tar's bytes, and one `Member` an entry, in the given order.

    Equal entries give equal bytes. A repeated key, or one outside `[A-Za-z0-9_-]+`, raises `ValueError`.
    """
    payloads: dict[str, bytes] = {}
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    buffer = io.BytesIO()
    writer = TarWriter(buffer, encoder=False, mtime=0)
    for entry in entries:
        if not _KEY.fullmatch(entry.key) or entry.key in payloads:
            raise ValueError(f"entry key {entry.key!r} is malformed or repeated")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
        payload = safetensors.torch.save(tensors)
        first = next(iter(tensors.values()))
        payloads[entry.key] = payload
        shapes[entry.key] = (tuple(first.shape), str(first.dtype).removeprefix("torch."))
        facts = json.dumps(entry.facts, sort_keys=True).encode()
        writer.write({"__key__": entry.key, "json": facts, "safetensors": payload})
    writer.close()
    data = buffer.getvalue()
    offsets = _payload_offsets(data)
    members = [
        Member(key, offsets[key], len(payload), checksum(payload), *shapes[key]) for key, payload in payloads.items()
    ]
    return data, members


def _payload_offsets(data: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {
            member.name.removesuffix(".safetensors"): member.offset_data
            for member in tar
            if member.name.endswith(".safetensors")
        }


def read_payload(store: Store, location: Location) -> bytes:
    """Return an entry's safetensors bytes, checked; `CorruptError` names the shard and what is wrong."""
    payload = store.read_range(location.shard, location.offset, location.size)
    if checksum(payload) != location.checksum:
        raise CorruptError(
            f"{store.url}/{location.shard}: bytes {location.offset}+{location.size} differ from their checksum; "
            "encode again after `latentline cache verify --repair`"
        )
    return payload


def read_tensors(store: Store, location: Location) -> dict[str, torch.Tensor]:
    """Return an entry's tensors by name, checked against the manifest's checksum."""
    return safetensors.torch.load(read_payload(store, location))
