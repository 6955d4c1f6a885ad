"""`encode --dry-run`: some of the samples as a table, on stderr."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from encode.config import EncodeConfig
from encode.files import name_of, parse_location
from pipeline.report import console

_SHOWN = 10
_CAPTION_LETTERS = 60


def show_samples(samples: pa.Table, config: EncodeConfig) -> None:
    """Print samples, one row each with all its captions, evenly spread from the first to the last."""
    console.print(sample_table(samples, config))


def sample_table(samples: pa.Table, config: EncodeConfig) -> Table:
    """samples: a row a window and caption, as a `Survey` has them. Captions are cut to fit."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    columns = [samples[name].to_pylist() for name in ("dataset", "latents_key", "context_key", "captions_key")]
    for row, (dataset, latents, context, captions) in enumerate(zip(*columns, strict=True)):
        groups.setdefault((dataset, latents, captions or context), []).append(row)
    chosen = sorted({round(place) for place in np.linspace(0, len(groups) - 1, min(_SHOWN, len(groups)))})
    windows = list(groups.values())
    table = Table(title=f"{len(chosen)} of {len(groups)} samples", title_justify="left")
    for heading in ("dataset", "video", "window", "fps", "size", "caption"):
        table.add_column(heading, no_wrap=heading in ("window", "fps", "size"), overflow="fold")
    for index in chosen:
        rows = samples.take(windows[index]).to_pylist()
        first = rows[0]
        window = f"{first['start']} to {first['start'] + first['num_frames'] - 1}"
        fps = "source" if first["fps"] is None else f"{first['fps']:g}"
        captions = "\n".join(_caption(row["caption_name"], row["caption"]) for row in rows)
        size = f"{config.width}x{config.height}"
        cells = first["dataset"], name_of(parse_location(first["source"])), window, fps, size, captions
        table.add_row(*map(Text, cells))
    return table


def _caption(name: str | None, caption: str) -> str:
    text = " ".join(caption.split())
    text = text if len(text) <= _CAPTION_LETTERS else f"{text[: _CAPTION_LETTERS - 3]}..."
    return f"{name}: {text}" if name else text
