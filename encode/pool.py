"""Decoder processes that can be killed, fed a bounded number of windows ahead.

A decoder that exceeds a limit or dies is replaced, its window becomes a DecodeError, and every other window is decoded
as if nothing had happened (`encode.decoder`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from encode.decode import DecodeError, DecodeJob, VideoInfo
from encode.decoder import Decoder, DecoderLost, Task
from encode.files import VideoFile

__all__ = ["DecodeError", "DecodeJob", "DecodePool", "DecoderLost"]

_CHECK_SECONDS = 0.5


class DecodePool:
    """`num_workers` decoder processes.

    timeout_seconds: a window or probe may take, from the moment a decoder has it.
    memory_mib: address space a decoder may use, its libraries and the frames included; None for no limit.
    threads: decoder threads a process.

    `wait_seconds` is the time `imap` has kept its consumer waiting. Use as a context manager, or call `close`.
    Processes start with the first job. Not for use from several threads at once, `submit` and `probe` excepted.
    """

    def __init__(
        self,
        num_workers: int,
        timeout_seconds: float,
        *,
        memory_mib: int | None = 8192,
        threads: int = 1,
    ) -> None:
        self.wait_seconds = 0.0
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._closed = False
        self._decoders = [Decoder(timeout_seconds, memory_mib or 0, threads) for _ in range(num_workers)]
        self._threads = [
            threading.Thread(target=decoder.serve, args=(self._tasks,), daemon=True, name=f"decoder-{i}")
            for i, decoder in enumerate(self._decoders)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders that run now."""
        return [pid for decoder in self._decoders if (pid := decoder.pid) is not None]

    def submit(self, job: DecodeJob) -> Future[npt.NDArray[np.uint8]]:
        """Frames uint8 RGB [num_frames, height, width, 3], or a DecodeError, in a future. Unbounded: see `imap`."""
        return self._put(job)

    def probe(self, path: VideoFile) -> Future[VideoInfo]:
        """`encode.decode.probe` in a decoder process, under the same limits."""
        return self._put(path)

    def imap(
        self, jobs: Iterable[DecodeJob], ahead: int | None = None, check: Callable[[], None] = lambda: None
    ) -> Generator[tuple[DecodeJob, npt.NDArray[np.uint8] | DecodeError], None, None]:
        """Each job with its frames or its error, in the order of the jobs; decoding begins with the call.

        ahead: windows decoded or being decoded that the consumer has not asked for yet, at most; default
            `num_workers + 1`. Each takes num_frames x height x width x 3 bytes. Frames are the consumer's to keep.
        check: called every half second while waiting; may raise, to wait no longer.

        Close it unless it is used up: what still waits is then cancelled.
        """
        results = self._imap(jobs, ahead, check)
        next(results)
        return results

    def _imap(
        self, jobs: Iterable[DecodeJob], ahead: int | None, check: Callable[[], None]
    ) -> Generator[Any, None, None]:
        ahead = len(self._decoders) + 1 if ahead is None else max(1, ahead)
        waiting: deque[tuple[DecodeJob, Future[npt.NDArray[np.uint8]]]] = deque()
        iterator = iter(jobs)

        def fill() -> None:
            while len(waiting) < ahead and (job := next(iterator, None)) is not None:
                waiting.append((job, self.submit(job)))

        try:
            fill()
            yield None
            while waiting:
                yield self._next(waiting, check)
                fill()
        finally:
            for _, future in waiting:
                future.cancel()

    def _next(
        self, waiting: deque[tuple[DecodeJob, Future[npt.NDArray[np.uint8]]]], check: Callable[[], None]
    ) -> tuple[DecodeJob, npt.NDArray[np.uint8] | DecodeError]:
        """In a function of its own, so that `imap` keeps no frames alive while it waits."""
        job, future = waiting.popleft()
        begin = time.monotonic()
        try:
            while not futures.wait([future], _CHECK_SECONDS).done:
                check()
            return job, future.result()
        except DecodeError as error:
            return job, error
        finally:
            future.cancel()
            self.wait_seconds += time.monotonic() - begin

    def close(self) -> None:
        """Kill the decoders and cancel what they have not finished. Nothing is left; may be called again."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    task[1].cancel()
        for decoder in self._decoders:
            decoder.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _put(self, job: DecodeJob | VideoFile) -> Future[Any]:
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[Any] = Future()
        self._tasks.put((job, future))
        return future
