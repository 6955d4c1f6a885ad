"""What a disk can refuse, told as one line: full, over its quota, read-only, or not ours to write to."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from manifests.errors import LatentlineError

_REFUSALS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its rights, or write elsewhere",
    errno.EPERM: "change its rights, or write elsewhere",
}

_IN_TEXT = re.compile(r"I/O error: (.+) \(os error (\d+)\)")


def refusal(error: BaseException | None) -> str | None:
    """The reason and what to do, if this is a disk that refuses; None for any other error.

    safetensors has the system's error in its text alone, and torch raises one of its own on top of it.
    """
    while error is not None:
        number, reason = None, None
        if isinstance(error, OSError):
            number, reason = error.errno, error.strerror
        elif isinstance(error, SafetensorError) and (found := _IN_TEXT.search(str(error))):
            number, reason = int(found[2]), found[1]
        if number in _REFUSALS:
            return f"{reason}; {_REFUSALS[number]}"
        error = error.__context__
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a `LatentlineError` that names `path` if the disk refuses what is written there."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise LatentlineError(f"{path}: cannot be written: {reason}") from error
