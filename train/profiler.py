"""A trace of a few training steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_SKIPPED_STEPS = 3  # compiling, and the profiler's own warm-up
_TRACED_STEPS = 3


@contextmanager
def traced(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; write `folder/trace.json` of steps 4 to 6, or nothing for None."""
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    schedule = torch.profiler.schedule(wait=_SKIPPED_STEPS - 1, warmup=1, active=_TRACED_STEPS, repeat=1)

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / "trace.json"))

    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
