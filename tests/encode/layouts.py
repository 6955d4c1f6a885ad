"""Datasets in the public layouts, and what reading them gives, for the tests of `encode.sources`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from encode.config import DataConfig, DatasetConfig
from encode.filters import filtered_sources
from encode.sources import SourceItem, Sources
from manifests.errors import UsageError


def write_files(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Files below a folder, by path; text as UTF-8."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def write_tar(path: Path, members: Mapping[str, str | bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            payload = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def read(layout: str, path: Path, **settings: Any) -> Sources:
    dataset = DatasetConfig(layout=layout, path=str(path), **settings)
    return filtered_sources(DataConfig(datasets={"d": dataset}))


def captions(items: list[SourceItem]) -> dict[str, Any]:
    """Captions by name of the video: the text where there is one without a name, else all by name."""
    return {item.name: item.captions.get("", dict(item.captions)) for item in items}


def error_of(layout: str, path: Path, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(layout, path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(("data.datasets.d", str(path)))
    return message
