"""What uncompressed tars hold, from their headers alone: names, offsets and sizes of the members."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from encode.files import TarMember
from encode.sources.folder import files_below
from manifests.errors import UsageError


@dataclass(frozen=True, slots=True)
class TarGroup:
    """Members of one tar that share a key. key: path in the tar up to the first dot of the file's name.

    members: by suffix, lower case, with its dot.
    """

    tar: Path
    key: str
    members: dict[str, TarMember]


def tars_at(where: str, path: Path) -> list[Path]:
    """The tar a path is, or those below it, sorted. `UsageError` if there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{where}: there is no folder or tar {path}: correct {where}.path")
    tars = sorted(file for file in files_below(path) if file.suffix == ".tar")
    if not tars:
        raise UsageError(f"{where}: {path} holds no .tar file (compressed ones cannot be read in place)")
    return tars


def members_of(where: str, tar: Path) -> Iterator[TarMember]:
    """The regular files of a tar, in its order; names with a part that begins with a dot are not looked at.

    Raises `UsageError` for a tar that is compressed, torn, not readable, or no tar.
    """
    try:
        with tarfile.open(tar, mode="r:") as opened:
            for info in opened:
                if info.isreg() and not any(part.startswith(".") for part in _parts(info.name)):
                    yield TarMember(tar, info.name, info.offset_data, info.size)
            # tarfile takes a damaged header after the first for the end; the end of a whole tar is zeros.
            with open(tar, "rb") as file:
                file.seek(opened.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"damaged or cut at byte {opened.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{where}: {tar} is not a readable, uncompressed tar: {reason}") from error


def groups_of(where: str, tar: Path) -> list[TarGroup]:
    """The members of a WebDataset tar by key, in the order of the first of each."""
    groups: dict[str, TarGroup] = {}
    for member in members_of(where, tar):
        path = PurePosixPath(member.name)
        stem, dot, suffix = path.name.partition(".")
        group = groups.setdefault(str(path.with_name(stem)), TarGroup(tar, str(path.with_name(stem)), {}))
        if f"{dot}{suffix}".lower() in group.members:
            raise UsageError(f"{where}: {tar} holds {member.name} twice")
        group.members[f"{dot}{suffix}".lower()] = member
    return list(groups.values())


def read_member(member: TarMember) -> bytes:
    """The bytes of a small member."""
    with open(member.tar, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _parts(name: str) -> list[str]:
    return [part for part in PurePosixPath(name).parts if part not in (".", "..")]
