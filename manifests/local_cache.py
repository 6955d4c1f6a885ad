"""A read-through copy of a cache's entries on this machine's own disk.

It keeps ranges, one file an entry, not whole shards: training order jumps between shards from sample to sample, so
whole shards would fetch a hundred entries to use one, while a range costs what the read would have cost anyway. Tars
never change under their name, so a range is known by the tar's path, its offset and its size.

Any number of processes share a folder. Files appear whole (written aside, then renamed), begin with a CRC-32 of the
rest, and are dropped and fetched again when it does not match. The oldest used go first when the folder is full.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from manifests.errors import UsageError
from manifests.store import MAX_RETRIES, Store

_log = logging.getLogger(__name__)

_CHECK_BYTES = 4
_KEEP = 0.9  # of the limit, after an eviction
_STALE_SECONDS = 3600.0
_ASIDE = ".part-"
_OURS = re.compile(r"[0-9a-f]{40}|\.part-.*")


class CachedStore(Store):
    """A `Store` whose range reads are kept in `folder`, at most `limit_bytes` of them.

    The limit holds whatever the number of processes. A disk that is full or breaks costs a warning and the copy,
    never the read. Other files in the folder are neither counted nor removed. Raises `UsageError` if the folder cannot
    be made or written, or is the cache's own.
    """

    def __init__(self, url: str, folder: str | Path, limit_bytes: int, *, max_retries: int = MAX_RETRIES) -> None:
        super().__init__(url, max_retries=max_retries)
        self.folder = Path(folder).expanduser().resolve()
        self.limit_bytes = limit_bytes
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._warned = False
        if self.root is not None and self.folder.is_relative_to(self.root):
            raise UsageError(f"train.local_cache {str(folder)!r}: is inside the cache {url!r}; choose another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._counted() as counter:
                counter.total = self._evict(limit_bytes)
        except OSError as error:
            raise UsageError(f"train.local_cache {str(folder)!r}: {error.strerror or error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return (CachedStore, (self.url, self.folder, self.limit_bytes))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        file = self._file(path, offset, size)
        data = self._kept(file, size)
        with self._lock:
            self.hits += data is not None
            self.misses += data is None
        if data is None:
            data = super().read_range(path, offset, size)
            self._keep(file, data)
        return data

    def _file(self, path: str, offset: int, size: int) -> Path:
        name = hashlib.sha256(f"{self.url}\n{path}\n{offset}\n{size}".encode()).hexdigest()[:40]
        return self.folder / name[:2] / name

    def _kept(self, file: Path, size: int) -> bytes | None:
        try:
            stored = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        data = stored[_CHECK_BYTES:]
        if len(data) == size and stored[:_CHECK_BYTES] == _check(data):
            return data
        file.unlink(missing_ok=True)
        return None

    def _keep(self, file: Path, data: bytes) -> None:
        size = _CHECK_BYTES + len(data)
        if size > self.limit_bytes * (1 - _KEEP):
            return
        try:
            file.parent.mkdir(exist_ok=True)
            with self._reserve(file.parent, size) as aside:
                try:
                    aside.write(_check(data))
                    aside.write(data)
                    aside.flush()
                    os.replace(aside.name, file)
                except OSError:
                    os.unlink(aside.name)
                    raise
        except OSError as error:
            with self._lock:
                warned, self._warned = self._warned, True
            if not warned:
                _log.warning("train.local_cache %s: %s; going on without it", self.folder, error.strerror or error)

    def _reserve(self, folder: Path, size: int) -> IO[bytes]:
        """A file of its final size from the start, so that whoever counts the folder counts it in full."""
        with self._counted() as counter:
            if counter.total + size > self.limit_bytes:
                counter.total = self._evict(int(self.limit_bytes * _KEEP) - size)
            aside = tempfile.NamedTemporaryFile(dir=folder, prefix=_ASIDE, delete=False)  # noqa: SIM115
            os.truncate(aside.fileno(), size)
            counter.total += size
        return aside

    @contextmanager
    def _counted(self) -> Iterator[_Counter]:
        """Have the count of the folder's bytes to oneself, among all threads and processes.

        It may be too high, after a kill or an overwritten file, never too low; an eviction sets it right.
        """
        with open(self.folder / ".bytes", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            stored = file.read()
            counter = _Counter(int(stored) if stored.isdigit() else self.limit_bytes)
            yield counter
            file.truncate(0)
            file.write(b"%d" % counter.total)

    def _evict(self, most: int) -> int:
        """Remove the longest unused files until `most` bytes are left, and return how many are."""
        kept = []
        for file in self.folder.glob("??/*"):
            if not _OURS.fullmatch(file.name):
                continue
            try:
                stat = file.stat()
            except FileNotFoundError:
                continue
            if file.name.startswith(_ASIDE) and time.time() - stat.st_mtime > _STALE_SECONDS:
                file.unlink(missing_ok=True)
            else:
                kept.append((stat.st_mtime_ns, stat.st_size, file))
        size = sum(entry[1] for entry in kept)
        for _, file_size, file in sorted(kept):
            if size <= most:
                break
            if not file.name.startswith(_ASIDE):  # being written
                file.unlink(missing_ok=True)
                size -= file_size
        return size


@dataclass
class _Counter:
    total: int


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECK_BYTES, "little")
