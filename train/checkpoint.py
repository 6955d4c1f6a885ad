"""Checkpoints: a run's whole state in a folder that is complete or not there.

    <output>/checkpoints/step_00000100/
        pytorch_lora_weights.safetensors    the adapter, as stock diffusers loads it
        optimizer.safetensors               `<parameter name>/<state name>`: independent of ranks and sharding
        state.json                          step, samples consumed, snapshot, settings that must not change
        complete.json                       size and SHA-256 of each of the others, written last

The folder is written under a temporary name, every file is synced, and the rename comes last. A folder whose
files differ from its `complete.json` is torn (a crash of the machine, a full disk): it is skipped with a note.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from manifests.errors import LatentlineError, UsageError
from manifests.mixture import Mixture
from train.adapters import WEIGHTS_NAME, adapter_parameters, load_adapter, save_adapter
from train.config import TrainConfig

LAYOUT_VERSION = 1

_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_COMPLETE = "complete.json"
_BUILDING = ".building-"
_FIXED = ("seed", "batch_size", "dtype", "method", "lora", "optimizer", "schedule", "objective")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is. step: optimizer steps done. samples_consumed: positions of the order used up."""

    step: int
    samples_consumed: int


def fixed_settings(
    config: TrainConfig, *, snapshot_hash: str, base_digest: str, mixture: Mixture = Mixture()
) -> dict[str, Any]:
    """Return what a run may not change when it resumes, by dotted name, as JSON values.

    `steps` is among them only where the schedule depends on it; micro-batches, parallelism, activation
    policy, threads and tracking are free.
    """
    fixed: dict[str, Any] = {"snapshot": snapshot_hash, "model": base_digest, **mixture.settings()}
    for name in _FIXED:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fixed |= {f"train.{name}.{key}": part for key, part in dataclasses.asdict(value).items()}
        else:
            fixed[f"train.{name}"] = value
    if config.schedule.kind == "cosine":
        fixed["train.steps"] = config.steps
    return json.loads(json.dumps(fixed))


def save(
    folder: Path,
    progress: Progress,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    *,
    keep_last: int,
) -> Path:
    """Write the checkpoint of `progress` under `folder`, drop all but the last `keep_last`, return its path.

    Raises `LatentlineError` if it cannot be written; earlier checkpoints stay as they are.
    """
    final = at_step(folder, progress.step)
    building = folder / f"{_BUILDING}{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_BUILDING}*"):
            shutil.rmtree(leftover)
        building.mkdir()
        save_adapter(building, transformer)
        safetensors.torch.save_file(_optimizer_tensors(optimizer, transformer), building / _OPTIMIZER)
        state = {"layout": LAYOUT_VERSION, **dataclasses.asdict(progress), "settings": dict(settings)}
        (building / _STATE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
        files = {name: _facts(building / name) for name in (WEIGHTS_NAME, _OPTIMIZER, _STATE)}
        (building / _COMPLETE).write_text(json.dumps(files, indent=2, sort_keys=True) + "\n")
        for path in (*building.iterdir(), building):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        building.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise LatentlineError(f"checkpoint {str(final)!r}: cannot be written: {error}") from error
    for old in _folders(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def latest_good(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are what they were when it was written, or None."""
    for path in reversed(_folders(folder)):
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("skipping checkpoint %s: %s", path, problem)
    return None


def at_step(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint by its path."""
    return int(path.name.removeprefix("step_"))


def load(
    path: Path, transformer: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> Progress:
    """Put a checkpoint's adapter and optimizer state in place and return how far it was.

    Raises `UsageError` naming every setting that differs from the run that wrote it.
    """
    if not (path / _STATE).is_file():
        raise UsageError(
            f"checkpoint {str(path)!r} is not readable on every rank; train.output must be a shared folder"
        )
    state = json.loads((path / _STATE).read_text())
    if state["layout"] > LAYOUT_VERSION:
        raise UsageError(f"checkpoint {str(path)!r} was written by a newer latentline; upgrade to resume it")
    before = state["settings"]
    changed = [
        f"{name} (was {before.get(name)!r}, now {settings.get(name)!r})"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise UsageError(
            f"checkpoint {str(path)!r} was made with other settings: {', '.join(changed)}; "
            "change them back, or choose another train.output"
        )
    load_adapter(transformer, path)
    _load_optimizer(optimizer, transformer, safetensors.torch.load_file(path / _OPTIMIZER))
    return Progress(state["step"], state["samples_consumed"])


def _optimizer_tensors(optimizer: torch.optim.Optimizer, transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{part}": tensor.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(transformer).items()
        for part, tensor in optimizer.state[parameter].items()
    }


def _load_optimizer(
    optimizer: torch.optim.Optimizer, transformer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore the state by parameter name; the optimizer holds its parameters in `adapter_parameters`' order."""
    names = list(adapter_parameters(transformer))
    state: dict[int, dict[str, torch.Tensor]] = {number: {} for number in range(len(names))}
    number_of = {name: number for number, name in enumerate(names)}
    for key, tensor in tensors.items():
        name, part = key.rsplit("/", 1)
        state[number_of[name]][part] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _problem(path: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, if anything."""
    try:
        files = json.loads((path / _COMPLETE).read_text())
    except (OSError, ValueError):
        return f"{_COMPLETE} is missing or unreadable"
    for name, facts in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _facts(path / name) != facts:
            return f"{name} differs from what was written"
    return None


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
