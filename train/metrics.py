"""Where a run's numbers go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked.

One record an interval, `step` being the optimizer steps done. A resumed run drops the records past the step
it resumes from, so the file reads as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from manifests.disk import writing
from manifests.errors import LatentlineError, UsageError
from train.config import TrackConfig

METRICS_NAME = "metrics.jsonl"


def check_trackers(track: TrackConfig) -> None:
    """Raise `UsageError` if a tracker is asked for that is not installed."""
    if track.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("train.track.wandb: the package wandb is not installed; `pip install wandb` or set it false")


class Metrics:
    """The sinks of one run, on the main rank.

    folder: the run's output. done: steps already done; later records are dropped. settings: shown by W&B.
    """

    def __init__(self, folder: Path, track: TrackConfig, *, done: int, settings: Mapping[str, Any]) -> None:
        check_trackers(track)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / METRICS_NAME
        _truncate(self._file, done)
        self._board: Any = None
        if track.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._wandb: Any = None
        if track.wandb:
            import wandb

            self._wandb = wandb.init(
                project=track.wandb_project,
                name=folder.name,
                dir=str(folder),
                config=dict(settings),
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
            )

    def record(self, values: Mapping[str, float | int]) -> None:
        """Write one record; `values["step"]` orders them. Names without a slash are the training's."""
        with writing(self._file), open(self._file, "a") as file:
            file.write(json.dumps(dict(values)) + "\n")
        step = int(values["step"])
        scalars = {name: value for name, value in values.items() if name != "step"}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a picture file in TensorBoard and W&B."""
        if self._board is not None:
            with Image.open(path) as image:
                self._board.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class Meter:
    """Speed over the steps since the last record."""

    def __init__(self) -> None:
        self._started = perf_counter()
        self._waited_before = 0.0
        self._waited = 0.0
        self._steps = 0
        self._samples = 0

    def add(self, *, samples: int, waited: float) -> None:
        """Count one step. waited: seconds spent waiting for data since the run began."""
        self._steps += 1
        self._samples += samples
        self._waited = waited

    def pause(self, seconds: float) -> None:
        """Leave out time that went to something other than training."""
        self._started += seconds

    def take(self) -> dict[str, float]:
        """Return seconds a step, samples a second (of all ranks) and the share of time spent waiting; begin anew."""
        now = perf_counter()
        seconds = now - self._started
        speed = {
            "seconds_per_step": seconds / self._steps,
            "samples_per_second": self._samples / seconds,
            "data_wait_share": (self._waited - self._waited_before) / seconds,
        }
        self._started, self._waited_before = now, self._waited
        self._steps = self._samples = 0
        return speed


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first; a last line cut by a kill is left out.

    Raises `LatentlineError` for any other line that is no record.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        return []
    return [_record(path, number, line) for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1)]


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LatentlineError(f"{path}: line {number} is not JSON: {error}; remove that line") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise LatentlineError(f"{path}: line {number} is no record of a step; remove that line")
    return record


def _truncate(path: Path, done: int) -> None:
    """Keep the records of the first `done` steps, by an atomic replacement of the file."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= done]
    building = path.with_suffix(".building")
    building.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(building, path)
