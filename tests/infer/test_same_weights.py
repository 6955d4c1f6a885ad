"""What tells one file of weights from another: its tensors and metadata, not the order a writer put them in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from infer.results import _weights


def reordered(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_the_order_of_metadata_makes_no_difference_and_all_else_does(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    first = save({"a": tensor}, {"rank": "4", "alpha": "8"})
    files = {
        "first": first,
        "reordered": reordered(first),
        "values": save({"a": tensor + 1}, {"rank": "4", "alpha": "8"}),
        "names": save({"b": tensor}, {"rank": "4", "alpha": "8"}),
        "metadata": save({"a": tensor}, {"rank": "4", "alpha": "4"}),
        "another format": b"PK\x03\x04 no safetensors",
        "empty": b"",
    }
    digests = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        digests[name] = _weights(tmp_path / name)
    assert files["first"] != files["reordered"]
    assert digests["first"] == digests.pop("reordered")
    assert len(set(digests.values())) == len(digests)
