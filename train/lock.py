"""One run at a time writes to a folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.errors import UsageError

LOCK_NAME = ".lock"

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)

log = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if it is missing, on the main rank; nothing on the others.

    The file says who took it last and stays; the lock is the system's, and gone when its process is. Where the file
    system has no locks that is said and nothing is held. Raises `UsageError` while another process holds it, or if
    the folder cannot be written to.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115, the lock lasts as long as it is open
    except OSError as error:
        raise UsageError(f"output {folder}: cannot be a folder to write to: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                file.seek(0)
                who = file.read().strip() or "another process"
                raise UsageError(
                    f"output {folder}: {who} is writing to it; wait for that run, stop it, or choose another "
                    f"train.output (if its machine is gone, delete {LOCK_NAME} there)"
                ) from None
            log.warning("%s: no lock can be held here (%s); start one run at a time", folder, error.strerror)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
