"""One decoder process that can be killed, and the thread that feeds it.

A video may crash a decoder, hang it, or make it ask for all memory. Each decoder is therefore a process of its
own with a limit on time and on address space.

Frames are decoded into anonymous memory that both processes map: nothing is copied through a pipe, nothing is
named in the file system, a small /dev/shm does not matter, and the memory goes with the last array that uses it,
even if every process is killed. Decoders are fresh interpreters that import no torch and share no CUDA state.
"""

from __future__ import annotations

import math
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

import numpy as np

from encode.decode import DecodeError, DecodeJob
from encode.files import VideoFile

_START_SECONDS = 120.0
# NumPy's OpenBLAS reserves address space for every core, which the limit would count; nothing here multiplies.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Task = tuple[DecodeJob | VideoFile, "Future[Any]"]


class DecoderLost(DecodeError):
    """A decoder process was killed for its time limit, or died, while it had this video."""


class Decoder:
    """One decoder process and the thread that feeds it.

    timeout_seconds: a window or probe may take. memory_mib: of address space; 0 for no limit. threads: of the process.
    """

    def __init__(self, timeout_seconds: float, memory_mib: int, threads: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._arguments = [str(memory_mib), str(threads)]
        self._lock = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def serve(self, tasks: queue.SimpleQueue[Task | None]) -> None:
        """Take tasks until there is None; the body of the thread."""
        while (task := tasks.get()) is not None:
            job, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self._do(job)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            del task, job, future
        self._kill()

    def stop(self) -> None:
        """From another thread: end the process, so that `serve` returns to its queue, and start no other."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def _do(self, job: DecodeJob | VideoFile) -> Any:
        path = job.path if isinstance(job, DecodeJob) else job
        if self._process is None or self._process.poll() is not None:
            self._kill()
            self._start()
        assert self._connection is not None
        assert self._process is not None
        memory = _AnonymousMemory(job) if isinstance(job, DecodeJob) else None
        try:
            self._connection.send(job)
            if memory is not None:
                memory.send(self._connection, self._process.pid)
            seconds = self._timeout_seconds * (job.patience if isinstance(job, DecodeJob) else 1.0)
            if not self._connection.poll(seconds):
                self._kill()
                raise DecoderLost(f"{path}: decoding took over {seconds:g} s and was stopped")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            ended = self._kill()
            if self._stopped:
                raise RuntimeError("the pool was closed") from error
            raise DecoderLost(f"{path}: its decoder process died ({ended})") from error
        finally:
            if memory is not None:
                os.close(memory.descriptor)
        if isinstance(answer, str):
            raise DecodeError(answer)
        return answer if memory is None else memory.array

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-m", "encode.decode_worker", str(theirs.fileno()), *self._arguments]
        with self._lock, theirs:
            if self._stopped:
                ours.close()
                raise RuntimeError("the pool was closed")
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        try:
            if self._connection.poll(_START_SECONDS):
                self._connection.recv()
                return
            reason = f"gave no sign of life in {_START_SECONDS:g} s"
        except (EOFError, OSError):
            reason = "died at its start"
        raise RuntimeError(f"a decoder process {reason} ({self._kill()}): {' '.join(command)}")

    def _kill(self) -> str:
        """End the process, if there is one; how it ended, in words."""
        process, connection = self._process, self._connection
        if process is None:
            return "not started"
        process.kill()
        code = process.wait()
        if connection is not None:
            connection.close()
        with self._lock:
            self._process = self._connection = None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class _AnonymousMemory:
    """Zeroed memory for the frames of a job, which has no name anywhere. The descriptor is the owner's to close."""

    def __init__(self, job: DecodeJob) -> None:
        num_bytes = math.prod(job.shape)
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("frames")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        try:
            os.ftruncate(self.descriptor, num_bytes)
            memory = mmap.mmap(self.descriptor, num_bytes)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.array = np.frombuffer(memory, dtype=np.uint8).reshape(job.shape)

    def send(self, connection: Connection, pid: int) -> None:
        """Give the process at the other end of the connection access to the memory."""
        send_handle(connection, self.descriptor, pid)
