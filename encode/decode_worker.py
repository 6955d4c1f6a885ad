"""The process that decodes for `encode.pool`: `python -m encode.decode_worker SOCKET MEMORY_MIB THREADS`.

SOCKET is an inherited file descriptor. Each message is a `DecodeJob`, followed by the descriptor of the memory its
frames go to, or a file to probe; each answer is `None`, a `VideoInfo`, or a string that says what went wrong.
The process imports neither torch nor a recipe, outlives no parent, and is stopped by SIGKILL only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import cv2
import numpy as np

from encode.decode import DecodeJob, decode_window, probe
from encode.files import VideoFile
from encode.probe import DecodeError, VideoInfo

_PR_SET_PDEATHSIG = 1


def main(socket: int, memory_mib: int, threads: int) -> None:
    """Serve until the parent closes its end. memory_mib: limit of the address space, 0 for none."""
    _ignore_signals_meant_for_the_parent()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if memory_mib:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    cv2.setNumThreads(threads)
    connection = Connection(socket)
    connection.send(None)
    while True:
        try:
            job = connection.recv()
            descriptor = recv_handle(connection) if isinstance(job, DecodeJob) else None
        except (EOFError, ConnectionResetError):
            return
        connection.send(_answer(job, descriptor, memory_mib, threads))


def _answer(
    job: DecodeJob | VideoFile, descriptor: int | None, memory_mib: int, threads: int
) -> VideoInfo | str | None:
    path = job.path if isinstance(job, DecodeJob) else job
    try:
        if not isinstance(job, DecodeJob):
            return probe(job)
        assert descriptor is not None
        try:
            # Unmapped with the last array on it; an explicit close would fail while an exception refers to one.
            memory = mmap.mmap(descriptor, 0)
        except OSError as error:
            raise MemoryError from error
        finally:
            os.close(descriptor)
        decode_window(job, np.frombuffer(memory, dtype=np.uint8).reshape(job.shape), threads)
    except DecodeError as error:
        return str(error)
    except MemoryError:
        return f"{path}: decoding needs more than the {memory_mib} MiB of memory it may use"
    # One odd file must not end a job over millions; it is quarantined with the reason, and a bug that hits every
    # file ends the job through the limit on quarantined ones.
    except Exception as error:
        return f"{path}: decoding failed: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _ignore_signals_meant_for_the_parent() -> None:
    """A scheduler signals every process of a job; a decoder that died of it would look like a bad video."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
