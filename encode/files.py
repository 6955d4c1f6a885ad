"""Where the bytes of a video lie: a file of its own, or a part of an uncompressed tar, read where it is.

A location is written as text in plans, manifests and snapshots: a path, or `PATH.tar::MEMBER@OFFSET+SIZE`, with colons
in the member escaped. FFmpeg opens the byte range itself (its `subfile` protocol): nothing is unpacked or copied.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from manifests import keys

_LOCATION = re.compile(r"(?P<tar>.+)::(?P<name>[^:]+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of an uncompressed tar. offset, size: of its bytes in the tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        name = self.name.replace("%", "%25").replace(":", "%3A")
        return f"{self.tar}::{name}@{self.offset}+{self.size}"


VideoFile: TypeAlias = Path | TarMember


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells one state of a file from another. size: bytes. modified_ns: since the epoch; the tar's of a member."""

    location: str
    size: int
    modified_ns: int


def parse_location(text: str | VideoFile) -> VideoFile:
    """Read what `str` wrote of a `VideoFile`."""
    if not isinstance(text, str):
        return text
    match = _LOCATION.fullmatch(text)
    if match is None:
        return Path(text)
    return TarMember(Path(match["tar"]), unquote(match["name"]), int(match["offset"]), int(match["size"]))


def state_of(video: VideoFile, folders: dict[str, str] | None = None) -> FileState:
    """Resolve a video's path and look at its file; `OSError` if that cannot be.

    folders: resolved ones, by path, which a caller with many videos keeps: resolving takes a look at every parent.
    """
    folder, name = os.path.split(file_of(video))
    folders = {} if folders is None else folders
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    path = os.path.join(folders[folder], name)
    if os.path.islink(path):
        path = os.path.realpath(path)
    status = os.stat(path)
    if isinstance(video, TarMember):
        resolved = TarMember(Path(path), video.name, video.offset, video.size)
        return FileState(str(resolved), video.size, status.st_mtime_ns)
    return FileState(path, status.st_size, status.st_mtime_ns)


def file_of(video: VideoFile) -> Path:
    """The file that is opened: the video, or the tar it is in."""
    return video.tar if isinstance(video, TarMember) else video


def name_of(video: VideoFile) -> str:
    """The video's own file name, without folders."""
    return Path(video.name).name


def head_of(video: VideoFile, num_bytes: int) -> bytes:
    """The first bytes, fewer where there are no more."""
    with open(file_of(video), "rb") as file:
        if isinstance(video, TarMember):
            file.seek(video.offset)
            num_bytes = min(num_bytes, video.size)
        return file.read(num_bytes)


def digest_of(video: VideoFile) -> str:
    """Hash the bytes of a video: equal for a file and for its copy in a tar."""
    if isinstance(video, TarMember):
        return keys.file_digest(video.tar, video.offset, video.size)
    return keys.file_digest(video)


def ffmpeg_url(video: VideoFile) -> str:
    """What FFmpeg opens, and nothing else, whatever the characters of the path."""
    if isinstance(video, TarMember):
        return f"subfile,,start,{video.offset},end,{video.offset + video.size},,:file:{video.tar}"
    return f"file:{video}"
