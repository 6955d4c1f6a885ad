"""What is wrong with the bytes of a shard: each entry against its manifest row, and the tar as others read it."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from webdataset.tariterators import tar_file_iterator

from manifests.keys import checksum
from manifests.values import fault_of


def shard_faults(
    pieces: Iterable[bytes], size: int, rows: Sequence[Mapping[str, Any]], promised: Mapping[str, Any] | None
) -> tuple[list[list[str]], list[str]]:
    """Check a shard in one pass: (what is wrong with the entry of each row, what is wrong with the tar as a whole).

    pieces: the tar's bytes, in order, `size` in all; no more than a piece and an entry are held at a time.
    rows: of its manifest, in order. promised: `size` and `checksum` of the tar, where its manifest has them.
    """
    passing = _Passing(pieces, size, rows)
    unreadable, names = None, []
    try:
        names = [member["fname"] for member in tar_file_iterator(io.BufferedReader(passing))]
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" @ ")[0]
        unreadable = f"not a readable WebDataset tar: {reason}"
    found = passing.finish()
    faults = []
    if promised is not None and size != promised["size"]:
        faults.append(f"has {size} bytes, its manifest says {promised['size']}")
    elif promised is not None and found != promised["checksum"]:
        faults.append("differs from its checksum")
    expected = [f"{row['key']}.{suffix}" for row in rows for suffix in ("json", "safetensors")]
    if unreadable:
        faults.append(unreadable)
    elif names != expected:
        faults.append(f"a tar reader sees {len(names)} members, not the {len(expected)} of its manifest")
    return passing.faults, faults


class _Passing(io.RawIOBase):
    """A tar that is read once: its bytes are hashed, and entries checked, as they pass. faults: of each row's entry."""

    def __init__(self, pieces: Iterable[bytes], size: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.faults: list[list[str]] = [[] for _ in rows]
        self._rows = rows
        self._pieces = iter(pieces)
        self._state = hashlib.sha256()
        self._passed = 0
        self._left = memoryview(b"")
        self._waiting: dict[int, bytearray] = {}
        for number, row in enumerate(rows):
            if 0 <= row["offset"] <= row["offset"] + row["size"] <= size:
                self._waiting[number] = bytearray()
            else:
                self.faults[number] = [f"the tar ends before or inside bytes {row['offset']}+{row['size']}"]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left and (piece := next(self._pieces, None)) is not None:
            self._pass(piece)
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def finish(self) -> str:
        """Read what a tar reader did not, and return the checksum of all."""
        for piece in self._pieces:
            self._pass(piece)
        return self._state.hexdigest()

    def _pass(self, piece: bytes) -> None:
        self._state.update(piece)
        begin, end = self._passed, self._passed + len(piece)
        self._passed = end
        for number in list(self._waiting):
            row = self._rows[number]
            first, last = row["offset"], row["offset"] + row["size"]
            self._waiting[number] += piece[max(first, begin) - begin : max(0, last - begin)]
            if last <= end:
                self.faults[number] = _payload_faults(bytes(self._waiting.pop(number)), row)


def _payload_faults(payload: bytes, row: Mapping[str, Any]) -> list[str]:
    """Check one entry: checksum, tensors, shape, dtype, values."""
    if checksum(payload) != row["checksum"]:
        return [f"bytes {row['offset']}+{row['size']} differ from their checksum"]
    try:
        tensors = safetensors.torch.load(payload)
    except SafetensorError as error:
        return [f"not a safetensors file: {str(error).splitlines()[0]}"]
    if list(tensors) != [row["kind"]]:
        return [f"holds the tensors {', '.join(sorted(tensors))}, not one named {row['kind']}"]
    tensor = tensors[row["kind"]]
    faults = []
    found = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if found != (row["shape"], row["dtype"]):
        faults.append(f"is {found[1]} {found[0]}, its manifest says {row['dtype']} {row['shape']}")
    fault = fault_of(row["kind"], tensor)
    return [*faults, fault] if fault else faults
