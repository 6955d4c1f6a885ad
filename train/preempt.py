"""Signals that ask a run to stop: they set a flag, and the trainer looks at it between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGTERM comes from torchrun, `ray job stop` and most schedulers, SIGUSR1 from SLURM's `--signal`, SIGHUP from a
terminal that closes."""


class StopFlag:
    """requested: a signal arrived."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Catch `SIGNALS` while the context lasts; off the main thread, where Python allows no handlers, catch none.

    One that is ignored, as nohup has SIGHUP, stays so.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, flag._handle) for number in caught}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
