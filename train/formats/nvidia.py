"""NVIDIA's `.pt`: full checkpoints, LoRAs and DoRAs under `net.`, their moving average under `net_ema.`.

    net.blocks.0.self_attn.q_proj.weight                      a weight; `.base_layer.weight` if peft wrapped it
    net.blocks.0.self_attn.q_proj.lora_A.default.weight       LoRA, also lora_B
    net.blocks.0.self_attn.q_proj.lora_magnitude_vector.default.weight    DoRA

Files are opened with `weights_only=True`: no code in them runs. They hold no alpha; NVIDIA's experiment says it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifests.errors import UsageError
from train.formats.adapter import MAGNITUDE, Adapter, FullModel, check_finite, make_adapter
from train.formats.names import NameMap, unmatched

_NET, _EMA = "net.", "net_ema."
_ADAPTER_PART = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.default\.weight$")
_WRAPPERS = ("model", "module", "state_dict")
_LOAD_ERRORS = (RuntimeError, EOFError, OSError, ValueError, KeyError, torch.serialization.pickle.UnpicklingError)


def read_nvidia(
    path: Path, names: NameMap, *, alpha: float | None, ema: bool, where: Path | None = None
) -> Adapter | FullModel:
    """Read a `.pt`. A file with LoRA tensors gives the adapter; base weights beside them are left out, with a note.

    ema: take `net_ema.` and not `net.`. where: what errors name instead of the file. Raises `UsageError` for a tensor
    that is not the model's, and for an adapter without `alpha`.
    """
    try:
        # Transformer Engine keeps `_extra_state` as bytes in a BytesIO, which is data like a tensor.
        with torch.serialization.safe_globals([io.BytesIO]):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _LOAD_ERRORS as error:
        raise UsageError(
            f"{where or path}: cannot be opened as tensors alone (weights_only=True): {str(error).splitlines()[0]}"
        ) from error
    return _from_state(where or path, stored, names, alpha=alpha, ema=ema)


def _from_state(where: Path, stored: Any, names: NameMap, *, alpha: float | None, ema: bool) -> Adapter | FullModel:
    state = _unwrapped(where, stored)
    strangers = [name for name in state if not name.startswith((_NET, _EMA))]
    if strangers:
        raise unmatched(where, strangers, f"begins with neither {_NET!r} nor {_EMA!r}")
    prefix = _EMA if ema else _NET
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not chosen and ema:
        raise UsageError(f"{where}: has no {_EMA} weights; if the file itself is an EMA export, leave --ema out")
    if not chosen:
        raise UsageError(f"{where}: has {_EMA} weights only; pass --ema")
    ignored = [name for name in chosen if names.is_ignored(name)]
    weights, adapter, unknown = {}, {}, []
    for original, value in chosen.items():
        if names.is_ignored(original):
            continue
        is_part = _ADAPTER_PART.search(original) is not None
        stem = _ADAPTER_PART.sub("", original) if is_part else original.replace(".base_layer.", ".")
        ours = names.to_diffusers(stem)
        if ours is None or not isinstance(value, Tensor):
            unknown.append(prefix + original)
        elif is_part:
            adapter[ours + _canonical_part(original)] = value
        else:
            weights[ours] = value
    if unknown:
        raise unmatched(where, unknown, "matches nothing in the model")
    notes = [f"{len(ignored)} counters and tables that are no weights were left out"] if ignored else []
    if not adapter:
        check_finite(where, weights)
        return FullModel(weights, notes=tuple(notes))
    if alpha is None:
        raise UsageError(f"{where}: a .pt holds no alpha; pass --alpha with the lora_alpha it was trained with")
    if weights:
        notes.append(f"the file also holds {len(weights)} base weights, which were left out: give the base by --base")
    made = make_adapter(where, adapter, alpha)
    return Adapter(made.tensors, made.config, tuple(notes))


def write_nvidia(path: Path, weights: Adapter | FullModel, names: NameMap) -> None:
    """Write a `.pt` under `net.`. An adapter's alpha is not in it."""
    state, unknown = {}, []
    for ours, tensor in weights.tensors.items():
        original = names.to_original(ours)
        if original is None:
            unknown.append(ours)
        elif isinstance(weights, Adapter):
            stem = original.removesuffix(".weight")
            state[f"{_NET}{stem}.default.weight"] = tensor
        else:
            state[f"{_NET}{original}"] = tensor
    if unknown:
        raise unmatched(path, unknown, "has no name in NVIDIA's code")
    with open(path, "wb") as file:  # opened here, a full disk is an OSError
        torch.save(state, file)


def _canonical_part(original: str) -> str:
    match = _ADAPTER_PART.search(original)
    assert match
    return f".{MAGNITUDE}" if match.group(1) == MAGNITUDE else f".{match.group(1)}.weight"


def _unwrapped(where: Path, stored: Any) -> Mapping[str, Any]:
    """The state itself, if it lies under the one key trainers put it under."""
    while isinstance(stored, Mapping) and (
        inside := [key for key in _WRAPPERS if isinstance(stored.get(key), Mapping)]
    ):
        stored = stored[inside[0]]
    if not isinstance(stored, Mapping) or not stored:
        raise UsageError(f"{where}: holds no state dict")
    return stored
