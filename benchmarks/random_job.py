"""A training job at real size without videos: random weights, and a cache of random latents and contexts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_checkpoint import build_trainable
from pipeline.demo.checkpoint import build_tiny_checkpoint
from pipeline.recipe import Recipe, validate
from tests.train.caches import CONTEXT, SHAPE, make_snapshot

REAL_CONTEXT = (512, 1024)


def latent_shape(height: int, width: int, num_frames: int = 93) -> tuple[int, int, int, int]:
    return 16, (num_frames - 1) // 4 + 1, height // 8, width // 8


def make_job(folder: Path, *, shape: tuple[int, ...], samples: int, tiny: bool = False) -> tuple[Path, str]:
    """Write a checkpoint and a cache of samples of one latent shape (C, T, H, W); return their places.

    tiny: the demo's model and samples instead, to try a script on a CPU.
    """
    checkpoint = folder / "checkpoint"
    if tiny:
        build_tiny_checkpoint(checkpoint)
    elif not checkpoint.exists():
        build_trainable(checkpoint)
    shape, context = (SHAPE, CONTEXT) if tiny else (shape, REAL_CONTEXT)
    cache = folder / f"cache-{'x'.join(map(str, shape))}"
    if not cache.exists():
        make_snapshot(cache, checkpoint, shapes=(shape,) * samples, context=context, length=context[0])
    return checkpoint, str(cache)


def recipe_of(checkpoint: Path, cache: str, output: Path, **train: Any) -> Recipe:
    values = {
        "model": {"path": str(checkpoint)},
        "data": {"datasets": {"test": {"layout": "folder", "path": "unused"}}},
        "encode": {"cache": cache},
        "train": {"output": str(output), "snapshot": "train", "track": {"tensorboard": False}, **train},
    }
    return validate(values, "the benchmark's recipe")


def records_of(output: Path) -> list[dict[str, Any]]:
    """The steps of a run, from its metrics."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def seconds_per_step(records: Sequence[dict[str, Any]], last: int) -> float:
    return statistics.median(record["seconds_per_step"] for record in records[-last:])
