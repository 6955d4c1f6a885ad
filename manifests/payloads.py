"""What is wrong with the bytes of a shard: each entry against its manifest row, and the tar as others read it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from webdataset.tariterators import tar_file_iterator

from manifests.keys import checksum
from manifests.values import fault_of


def payload_faults(data: bytes, row: Mapping[str, Any]) -> list[str]:
    """Check one entry of a shard's bytes: extent, checksum, tensors, shape, dtype, values."""
    payload = data[row["offset"] : row["offset"] + row["size"]]
    if len(payload) != row["size"]:
        return [f"the tar ends before or inside bytes {row['offset']}+{row['size']}"]
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


def tar_faults(data: bytes, keys: Sequence[str], promised: Mapping[str, Any] | None) -> list[str]:
    """Check a shard's bytes as a whole: its checksum, and what stock WebDataset sees in it.

    keys: of its entries, in order. promised: `size` and `checksum` of the tar, where its manifest has them.
    """
    faults = []
    if promised is not None and len(data) != promised["size"]:
        faults.append(f"has {len(data)} bytes, its manifest says {promised['size']}")
    elif promised is not None and checksum(data) != promised["checksum"]:
        faults.append("differs from its checksum")
    try:
        names = [member["fname"] for member in tar_file_iterator(io.BytesIO(data))]
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" @ ")[0]
        return [*faults, f"not a readable WebDataset tar: {reason}"]
    expected = [f"{key}.{suffix}" for key in keys for suffix in ("json", "safetensors")]
    if names != expected:
        faults.append(f"a tar reader sees {len(names)} members, not the {len(expected)} of its manifest")
    return faults
