"""Writes checkpoints on the main rank, at once or beside the training: one at a time, and no error is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from train import checkpoint
from train.checkpoint import Progress, State

OnCheckpoint = Callable[[int, Path], None]
"""Called on the main rank after each checkpoint, with the step and the folder its weights lie in."""

log = logging.getLogger(__name__)


class Saver:
    """folder: of all checkpoints. background: write in a thread, which leaving the context waits for.

    With `background`, `on_checkpoint` is called from the training's thread, when the next checkpoint is due or at the
    end; an error of the thread is raised there too.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        keep_last: int,
        background: bool,
        on_checkpoint: OnCheckpoint | None,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.keep_last = keep_last
        self.on_checkpoint = on_checkpoint
        self._pool = ThreadPoolExecutor(1, "saver") if background else None
        self._pending: tuple[int, Future[Path]] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=True)
        if error is None:
            self.finish()
        elif self._pending is not None and (problem := self._pending[1].exception()) is not None:
            log.warning("%s", problem)

    def save(self, progress: Progress, state: State) -> None:
        """Write a checkpoint, after the one before; `state` is copies that nobody changes."""
        self.finish()
        if self._pool is None:
            self._tell(progress.step, self._write(progress, state))
        else:
            self._pending = progress.step, self._pool.submit(self._write, progress, state)

    def finish(self) -> None:
        """Wait for the checkpoint being written; raise its `LatentlineError` if it failed."""
        if self._pending is not None:
            step, future = self._pending
            self._pending = None
            self._tell(step, future.result())

    def _write(self, progress: Progress, state: State) -> Path:
        return checkpoint.write(self.folder, progress, state, self.settings, keep_last=self.keep_last)

    def _tell(self, step: int, path: Path) -> None:
        if self.on_checkpoint is not None:
            self.on_checkpoint(step, path)
