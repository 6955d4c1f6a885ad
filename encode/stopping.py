"""Being asked to stop: a signal only sets a flag, and the work looks at it between entries."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from manifests.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM comes from `ray job stop` and most schedulers, SIGUSR1 from SLURM's `--signal`, SIGINT from a terminal."""


class Stop:
    """A request to stop that may arrive at any time."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._catches = False

    @property
    def requested(self) -> bool:
        return self._number is not None

    def check(self) -> None:
        """Raise `Preempted` if a signal has arrived."""
        if self._number is not None:
            name = signal.Signals(self._number).name
            raise Preempted(f"stopped by {name}, what is committed is kept; run the same command to continue")

    def catch(self) -> None:
        """Install the handlers again, within `stop_on_signal`: `ray.init` takes SIGTERM for itself."""
        if self._catches:
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Catch `SIGNALS` while the context lasts; off the main thread, where Python allows no handlers, catch none.

    A second SIGINT is a KeyboardInterrupt, for a user who does not want to wait for the entry in work.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop._catches = True
    stop.catch()
    try:
        yield stop
    finally:
        stop._catches = False
        for number, handler in before.items():
            signal.signal(number, handler)
