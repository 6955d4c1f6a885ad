"""Checkpoints: a run's whole state in a folder that is complete or not there.

    <output>/checkpoints/step_00000100/
        pytorch_lora_weights.safetensors    LoRA or DoRA, as stock diffusers loads it
        trained_weights.safetensors         every other trained tensor, float32 (`train.trained`)
        ema.safetensors                     the average of all that trains, where there is one
        optimizer.safetensors               `<parameter name>/<state name>`: independent of ranks and sharding
        state.json                          step, samples consumed, snapshot, settings that must not change
        complete.json                       size and SHA-256 of each of the others, written last

The folder is written under a temporary name, every file is synced, and the rename comes last. A folder whose
files differ from its `complete.json` is torn (a crash of the machine, a full disk): it is skipped with a note.

Saving has two parts: `collect` copies the state to the main rank's memory, which all ranks must enter, and `write`
makes the folder, which may happen later and in a thread.
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
from train.adapters import (
    WEIGHTS_NAME,
    adapter_metadata,
    adapter_state,
    has_adapter,
    load_adapter,
    write_adapter,
)
from train.config import TrainConfig
from train.ema import Ema
from train.trained import (
    TRAINED_NAME,
    load_trained,
    save_trained,
    split_like,
    stored_parameters,
    to_host,
    trained_parameters,
)

LAYOUT_VERSION = 1

_EMA = "ema.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_COMPLETE = "complete.json"
_BUILDING = ".building-"
_FIXED = ("seed", "batch_size", "dtype", "lora", "optimizer", "schedule", "objective")

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
    fixed: dict[str, Any] = {"snapshot": snapshot_hash, "model": base_digest, "train.method": "+".join(config.methods)}
    fixed |= mixture.settings()
    optional = {
        "adapters": "adapters" in config.methods,
        "ema": config.ema.kind != "none",
        "trainable": bool(config.trainable),
        "frozen": bool(config.frozen),
        "base_linears": config.base_linears != "dtype",
    }
    for name in (*_FIXED, *(name for name, used in optional.items() if used)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fixed |= {f"train.{name}.{key}": part for key, part in dataclasses.asdict(value).items()}
        else:
            fixed[f"train.{name}"] = value
    if config.lora.branch == "both":
        del fixed["train.lora.branch"]  # what earlier checkpoints do not say
    if config.hints is not None:
        fixed["train.hints"] = dict(config.hints)
    if config.schedule.kind == "cosine":
        fixed["train.steps"] = config.steps
    return json.loads(json.dumps(fixed))


@dataclass(frozen=True)
class Weights:
    """Trained tensors in host memory. lora: as its file has them, None without LoRA. others: `stored_parameters`."""

    lora: dict[str, torch.Tensor] | None
    lora_metadata: dict[str, Any]
    others: dict[str, torch.Tensor]

    @property
    def file_name(self) -> str:
        """Of the file of LoRA or DoRA, else of the others."""
        return TRAINED_NAME if self.lora is None else WEIGHTS_NAME

    def write(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` and `trained_weights.safetensors`, or the one there is."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is not None:
            write_adapter(folder, self.lora, self.lora_metadata)
        if self.others:
            building = folder / f".{TRAINED_NAME}"
            save_trained(building, self.others)
            _sync(building)
            os.replace(building, folder / TRAINED_NAME)


@dataclass(frozen=True)
class State:
    """A run's whole state in host memory. ema: by parameter name, None without. optimizer: `<name>/<part>`."""

    weights: Weights
    ema: dict[str, torch.Tensor] | None
    optimizer: dict[str, torch.Tensor]


def collect_weights(transformer: torch.nn.Module, *, keep: bool = True) -> Weights:
    """Copy the trained tensors to host memory, whole; every rank must enter, those that do not `keep` get nothing."""
    lora = has_adapter(transformer)
    return Weights(
        (adapter_state(transformer) if keep else {}) if lora else None,
        adapter_metadata(transformer) if lora else {},
        to_host(stored_parameters(transformer), keep=keep),
    )


def collect(
    transformer: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None, *, keep: bool = True
) -> State:
    """Copy the state to host memory, whole; every rank must enter, those that do not `keep` get nothing."""
    optimizer_tensors = {
        f"{name}/{part}": tensor
        for name, parameter in trained_parameters(transformer).items()
        for part, tensor in optimizer.state[parameter].items()
    }
    return State(
        collect_weights(transformer, keep=keep),
        None if ema is None else ema.to_host(keep=keep),
        to_host(optimizer_tensors, keep=keep),
    )


def write(folder: Path, progress: Progress, state: State, settings: Mapping[str, Any], *, keep_last: int) -> Path:
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
        state.weights.write(building)
        safetensors.torch.save_file(state.optimizer, building / _OPTIMIZER)
        if state.ema is not None:
            safetensors.torch.save_file(state.ema, building / _EMA)
        document = {"layout": LAYOUT_VERSION, **dataclasses.asdict(progress), "settings": dict(settings)}
        (building / _STATE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        files = {path.name: _facts(path) for path in sorted(building.iterdir())}
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
    # Later ones are torn, or the run would have continued from them: they do not count among the kept.
    for old in [path for path in _folders(folder) if step_of(path) <= progress.step][:-keep_last]:
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
    path: Path,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    ema: Ema | None = None,
) -> Progress:
    """Put a checkpoint's weights, average and optimizer state in place and return how far it was.

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
        kept = f", or train.snapshot={before['snapshot']}" if before["snapshot"] != settings["snapshot"] else ""
        raise UsageError(
            f"checkpoint {str(path)!r} was made with other settings: {', '.join(changed)}; "
            f"change them back{kept}, or choose another train.output"
        )
    if has_adapter(transformer):
        load_adapter(transformer, path)
    if stored_parameters(transformer):
        load_trained(transformer, path / TRAINED_NAME)
    if ema is not None:
        ema.load(safetensors.torch.load_file(path / _EMA))
    _load_optimizer(optimizer, transformer, safetensors.torch.load_file(path / _OPTIMIZER))
    return Progress(state["step"], state["samples_consumed"])


def _load_optimizer(
    optimizer: torch.optim.Optimizer, transformer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore the state by parameter name; what has a parameter's shape is laid out as the parameter is."""
    names = {parameter: name for name, parameter in trained_parameters(transformer).items()}
    places = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number_of = {names[parameter]: number for number, parameter in enumerate(places)}
    state: dict[int, dict[str, torch.Tensor]] = {number: {} for number in range(len(places))}
    for key, tensor in tensors.items():
        name, part = key.rsplit("/", 1)
        parameter = places[number_of[name]]
        state[number_of[name]][part] = split_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _folders(folder: Path) -> list[Path]:
    """The checkpoints in order of step; a folder of another name, such as a copy put aside, is none."""
    named = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal() and path.is_dir()]
    return sorted(named, key=step_of)


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
