"""One way to read and write the cache, local or remote: bytes at relative paths, with put-if-absent.

Local folders, s3://, gs:// and az:// go through `obstore`; credentials come from the environment alone.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from manifests.errors import CorruptError, LatentlineError, UsageError

_SCHEMES = ("s3", "gs", "az")
MAX_RETRIES = 10
PIECE_BYTES = 8 << 20
_PAGE = 1000
_AFTER_ALL = "~"  # sorts after every character of a safe path
_SAFE_PATH = re.compile(r"[A-Za-z0-9_./-]+")


@dataclass(frozen=True)
class ObjectInfo:
    """path: relative to the store. size: bytes. modified: seconds since the epoch."""

    path: str
    size: int
    modified: float


class Store:
    """A folder of immutable objects, at a local path or an object-store URL.

    max_retries: how often a remote request is tried again after a server error, with growing pauses, before
    it is an error here. Whatever goes wrong is a one-line `LatentlineError` that names the object.
    Raises `UsageError` for a URL of another scheme, and for a local folder that is missing unless
    `create` is set.
    """

    def __init__(self, url: str | Path, *, create: bool = False, max_retries: int = MAX_RETRIES) -> None:
        self.url = str(url)
        self._max_retries = max_retries
        scheme, separator, _ = self.url.partition("://")
        self.root: Path | None = None
        if separator:
            if scheme not in _SCHEMES:
                raise UsageError(f"store {self.url!r}: scheme {scheme!r} is not one of {', '.join(_SCHEMES)}")
            try:
                self._store: Any = from_url(self.url, retry_config={"max_retries": max_retries})
            except (BaseError, ValueError) as error:
                raise UsageError(f"store {self.url!r}: {_first_line(error)}") from error
        else:
            self.root = Path(self.url).expanduser().resolve()
            if not create and not self.root.is_dir():
                raise UsageError(f"cache {self.url!r}: no such folder; `latentline encode` makes it")
            try:
                self._store = LocalStore(self.root, mkdir=True)
            except (BaseError, OSError) as error:
                raise LatentlineError(f"cache {self.url!r}: {_first_line(error)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (type(self), self.url, self._max_retries))

    def read(self, path: str) -> bytes:
        """Return an object's bytes; `FileNotFoundError` if there is none."""
        with self._errors(path, "read"):
            response = obstore.get(self._store, safe_path(path))
            data = response.bytes()
        return bytes(data)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; `CorruptError` if the object is missing or ends before."""
        try:
            with self._errors(path, f"read bytes {offset}+{size} of"):
                data = bytes(obstore.get_range(self._store, safe_path(path), start=offset, length=size))
        except FileNotFoundError as error:
            raise CorruptError(f"{self.url}/{path}: missing, but a manifest names it") from error
        except LatentlineError:
            if self.size(path) >= offset + size:
                raise
            raise CorruptError(f"{self.url}/{path}: ends before or inside bytes {offset}+{size}") from None
        if len(data) != size:
            raise CorruptError(f"{self.url}/{path}: ends inside bytes {offset}+{size}")
        return data

    def pieces(self, path: str) -> Iterator[bytes]:
        """Yield an object's bytes in order, a few MiB at a time; `FileNotFoundError` if there is none."""
        size = self.size(path)
        for begin in range(0, size, PIECE_BYTES):
            yield self.read_range(path, begin, min(PIECE_BYTES, size - begin))

    def size(self, path: str) -> int:
        """Return an object's size in bytes; `FileNotFoundError` if there is none."""
        with self._errors(path, "look at"):
            size = obstore.head(self._store, safe_path(path))["size"]
        return int(size)

    def write(self, path: str, data: bytes) -> None:
        """Put an object, replacing one of the same name."""
        self._put(path, data, "overwrite")

    def write_if_absent(self, path: str, data: bytes) -> bool:
        """Put an object unless the name is taken; say whether this call put it. Atomic among all writers.

        A remote put whose answer was lost is tried again and then finds its own object: it says False. Where that
        matters, compare what is there.
        """
        try:
            self._put(path, data, "create")
        except AlreadyExistsError:
            return False
        return True

    def _put(self, path: str, data: bytes, mode: Literal["create", "overwrite"]) -> None:
        try:
            with self._errors(path, "write"):
                obstore.put(self._store, safe_path(path), data, mode=mode, use_multipart=False)
                if self.root is not None:
                    _fsync(self.root / path)
        except FileNotFoundError as error:
            raise LatentlineError(f"{self.url}/{path}: cannot write it: the bucket or folder is not there") from error

    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is no error."""
        try:
            with self._errors(path, "delete"):
                obstore.delete(self._store, safe_path(path))
        except FileNotFoundError:
            return

    def exists(self, path: str) -> bool:
        try:
            with self._errors(path, "look at"):
                obstore.head(self._store, safe_path(path))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        """List the objects under a folder, in order of path."""
        with self._errors(prefix, "list"):
            found = [
                ObjectInfo(item["path"], item["size"], item["last_modified"].timestamp())
                for page in obstore.list(self._store, prefix=safe_path(prefix))
                for item in page
            ]
        return sorted(found, key=lambda item: item.path)

    def names(self, folder: str, *, skip: Sequence[str] = ()) -> Sequence[str]:
        """Names of the objects right inside a folder, unordered, without those that begin with a prefix in `skip`.

        S3 is not even asked for what is skipped, since its listings can start anywhere: whole ranges cost one
        request each. A local folder is read once, and nothing in it is opened or looked at.
        """
        if self.root is not None:
            with self._errors(folder, "list"):
                try:
                    found = os.listdir(self.root / safe_path(folder))
                except FileNotFoundError:
                    return []
            return [name for name in found if not name.startswith(tuple(skip))]
        found, offset = [], ""
        with self._errors(folder, "list"):
            for prefix in (*sorted(skip), None):
                for name in self._names_after(folder, offset):
                    if prefix is not None and name >= prefix:
                        break
                    found.append(name)
                offset = f"{prefix}{_AFTER_ALL}"
        return found

    def _names_after(self, folder: str, offset: str) -> Iterator[str]:
        start = f"{safe_path(folder)}/{offset}" if offset else None
        for page in obstore.list(self._store, prefix=folder, offset=start, chunk_size=_PAGE):
            yield from (item["path"].rsplit("/", 1)[1] for item in page)

    @contextmanager
    def _errors(self, path: str, verb: str) -> Iterator[None]:
        """Turn what the library raises into one line; a missing or present object stays what it is."""
        try:
            yield
        except (FileNotFoundError, AlreadyExistsError):
            raise
        except (BaseError, OSError) as error:
            raise LatentlineError(f"{self.url}/{path}: cannot {verb} it: {_reason(error)}") from error

    def require_put_if_absent(self) -> None:
        """Refuse a store that lets a second writer replace an object: commits would not be safe on it."""
        if self.root is not None:
            return
        path = f"probe/{uuid.uuid4().hex}"
        self.write_if_absent(path, b"1")
        refused = not self.write_if_absent(path, b"2")
        self.delete(path)
        if not refused:
            raise UsageError(
                f"store {self.url!r} does not honour put-if-absent (If-None-Match); "
                "encode to a local folder or another store"
            )


def safe_path(path: str) -> str:
    """Check a path inside the cache: relative, no `..`, no scheme, plain characters."""
    parts = PurePosixPath(path).parts
    if not _SAFE_PATH.fullmatch(path) or path.startswith("/") or ".." in parts:
        raise CorruptError(f"{path!r} is not a path inside a cache")
    return path


def _fsync(path: Path) -> None:
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reopen(kind: type[Store], url: str, max_retries: int) -> Store:
    return kind(url, max_retries=max_retries)


def _reason(error: BaseException) -> str:
    """The system's own words where there are any: the library prefixes them with its types and paths."""
    cause = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(cause.group(1))) if cause else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
