"""What a person sees of a run, on stderr: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_LINE_SECONDS = 10.0


class TrainProgress:
    """Shows records as they come. steps: of the whole run. done: already done. quiet: on all but one rank."""

    def __init__(self, *, steps: int, done: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._steps = steps
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                BarColumn(bar_width=10, table_column=Column(min_width=10)),
                TextColumn("{task.completed:.0f}/{task.total}", table_column=Column(min_width=2 * len(str(steps)) + 1)),
                TimeRemainingColumn(compact=True, table_column=Column(min_width=5)),
                TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True, ratio=1)),
                expand=True,
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, numbers="")

    def __enter__(self) -> TrainProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, values: Mapping[str, float | int]) -> None:
        """Show one record of metrics."""
        numbers = describe_record(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=int(values["step"]), numbers=numbers)
        elif values["step"] == self._steps or monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = monotonic()
            self.say(f"step {values['step']}/{self._steps}  {numbers}")

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe_record(values: Mapping[str, float | int]) -> str:
    """Return a record in words, what matters most first: a narrow terminal cuts the end off."""
    parts = [
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.2e}",
        f"{values['seconds_per_step']:.3g} s/step",
        f"data wait {values['data_wait_share']:.1%}",
        f"{values['samples_per_second']:.3g} samples/s",
    ]
    if "peak_memory_bytes" in values:
        parts.append(f"{values['peak_memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(parts)
