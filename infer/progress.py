"""What a person sees while videos are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import track as rich_track

from infer.results import Result

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items, with a bar on stderr where that is a terminal and they take their time."""
    console = Console(stderr=True)
    return rich_track(items, description, console=console, transient=True, disable=not console.is_terminal)


class VideoProgress(AbstractContextManager["VideoProgress"]):
    """Progress on stderr: bars on a terminal, a line a video elsewhere. bars: False on all ranks but one."""

    def __init__(self, count: int, *, bars: bool = True) -> None:
        self._console = Console(stderr=True)
        self._count = count
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not (bars and self._console.is_terminal),
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

    def done(self, result: Result, num_done: int) -> None:
        """Show what became of a request. num_done: on all ranks so far, 0 where this rank alone knows."""
        self._finished = max(self._finished + 1, num_done)
        self._progress.update(self._videos, completed=self._finished)
        line = f"video {self._finished}/{self._count}: "
        if result.video is None:
            line += f"{result.request.name} failed: {result.error}"
        elif self._progress.disable:
            line += f"{result.video} in {result.seconds:.1f} s"
        else:
            return
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)
