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


def refusal(error: BaseException | None) -> str | None:
    """The reason and what to do, if this is a disk that refuses; None for any other error.

    safetensors has the system's error in its text alone, and torch raises one of its own on top of it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            return f"{error.strerror}; {_REFUSALS[error.errno]}"
        if isinstance(error, SafetensorError) and (
            found := re.search(r"I/O error: (.+) \(os error (\d+)\)", str(error))
        ):
            return f"{found[1]}; {_REFUSALS[int(found[2])]}" if int(found[2]) in _REFUSALS else None
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
