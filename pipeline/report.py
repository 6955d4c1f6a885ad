"""How results and progress are shown: progress and log lines on stderr, results on stdout, JSON for machines."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from os import PathLike
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_LINE_SECONDS = 30.0

console = Console(stderr=True)


def progress_bar(**options: Any) -> Progress:
    """A progress bar for counted work; shown on a terminal only."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        **options,
    )


def track(description: str) -> Any:
    """Return a function that shows how far a loop over `total` items is: a bar, or a line now and then."""

    def wrap(items: Iterable[Any], total: int) -> Iterator[Any]:
        last_line = monotonic()
        with progress_bar() as progress:
            task = progress.add_task(description, total=total, note="")
            for done, item in enumerate(items, start=1):
                yield item
                progress.advance(task)
                if progress.disable and monotonic() - last_line >= _LINE_SECONDS:
                    last_line = monotonic()
                    log(f"{description}: {done} of {total}")

    return wrap


def quiet_downloads() -> None:
    """Keep the progress bars of huggingface_hub out of logs; a terminal keeps them."""
    from huggingface_hub.utils import disable_progress_bars

    if not console.is_terminal:
        disable_progress_bars()


def quiet_libraries() -> None:
    """Keep the progress bars of diffusers, transformers and huggingface_hub out of logs; a terminal keeps them.

    Imports them: for commands that load models.
    """
    if console.is_terminal:
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def log(message: str) -> None:
    """Print one line for people, on stderr."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def emit(result: Mapping[str, Any], *, as_json: bool, hide_zero: Collection[str] = ()) -> None:
    """Print a command's result on stdout: a JSON object, or a line a value.

    Numbers whose name, or a name around it, ends in "bytes" are shown in KiB and the like; JSON has them whole.
    hide_zero: names left out of the text where their value is 0 or empty. JSON has null where a number is not finite.
    """
    if as_json:
        json.dump(_plain(result), sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
        return
    lines = _lines({name: value for name, value in result.items() if not (name in hide_zero and not value)})
    width = max((len(label) for label, _ in lines), default=0)
    out = Console(highlight=False)
    for label, text in lines:
        first, *more = text.split("\n")
        head = Text.assemble((f"{label:<{width}}", "bold"), f"  {first}")
        head.rstrip()
        out.print(head, soft_wrap=True)
        for line in more:
            out.print(Text(f"{'':<{width}}  {line}"), soft_wrap=True)


def human_bytes(count: float) -> str:
    """1,048,576 as "1.0 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of each value; a mapping that holds mappings becomes a heading and indented lines."""
    lines = []
    for name, value in result.items():
        label, is_bytes = str(name).replace("_", " "), str(name).endswith("bytes")
        if isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values()):
            lines.append((label, ""))
            lines += [(f"  {inner}", _text(item, is_bytes)) for inner, item in value.items()]
        else:
            lines.append((label, _text(value, is_bytes)))
    return lines


def _text(value: Any, is_bytes: bool) -> str:
    if isinstance(value, Mapping):
        parts = []
        for name, item in value.items():
            if item is not None:
                text = _text(item, is_bytes or str(name).endswith("bytes"))
                parts.append(f"{name}: ({text})" if isinstance(item, Mapping) else f"{name}: {text}")
        return ", ".join(parts) or "none"
    if isinstance(value, list | tuple):
        return "\n".join(_text(item, is_bytes) for item in value) or "none"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool | str | PathLike):
        return str(value)
    if is_bytes:
        return human_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PathLike):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
