"""What a person sees while videos are made."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class VideoProgress(AbstractContextManager["VideoProgress"]):
    """Progress on stderr: bars on a terminal, a line a video elsewhere."""

    def __init__(self, count: int) -> None:
        self._console = Console(stderr=True)
        self._count = count
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._videos = self._progress.add_task("videos", total=self._count)
        self._steps = self._progress.add_task("steps")
        self._finished = 0

    def __enter__(self) -> VideoProgress:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def start(self, name: str, num_steps: int) -> None:
        self._progress.reset(self._steps, total=num_steps, description=name)

    def step(self) -> None:
        self._progress.advance(self._steps)

    def done(self, path: Path, seconds: float) -> None:
        self._finished += 1
        self._progress.advance(self._videos)
        if self._progress.disable:
            line = f"video {self._finished}/{self._count}: {path} in {seconds:.1f} s"
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)
