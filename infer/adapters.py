"""Adapters onto a pipeline's transformer, strictly: every tensor of the file lands in the model, or it is an error.

diffusers only warns about keys that match nothing, and a video from such a pipeline is the base model's. Here
the file is checked against the model before anything is loaded, and read back from the model after.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from infer.config import AdapterConfig
from infer.trained import check_trained_weights, is_trained_only
from manifests.errors import LatentlineError, UsageError

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
MAGNITUDE = "lora_magnitude_vector"

_CONVERT = "`latentline export SOURCE --to diffusers --output FOLDER` converts other formats"


def load_adapters(pipe: Any, adapters: Mapping[str, AdapterConfig], *, fuse: bool = False) -> None:
    """Load and activate `adapters` (LoRA or DoRA, diffusers' format) together, each at its weight.

    The update is scaled by alpha / rank, alpha from the file's adapter metadata; a file without it means
    alpha = rank, as in diffusers. fuse: add the updates to the base weights and drop the adapters.
    Raises UsageError for a missing or foreign file, LatentlineError if the model does not take all of it.
    """
    if not adapters:
        return
    check_adapters(adapters, fuse=fuse)
    linears = {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in pipe.transformer.named_modules()
    }
    states = {}
    for name, adapter in adapters.items():
        path = find_adapter(Path(adapter.path))
        states[name] = (path, _read(path))
        _check_against_model(path, states[name][1], linears)
    for name, (path, state) in states.items():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        _check_loaded(path, state, get_peft_model_state_dict(pipe.transformer, adapter_name=name))
    pipe.set_adapters(list(adapters), [adapter.weight for adapter in adapters.values()])
    if fuse:
        pipe.fuse_lora(adapter_names=list(adapters))
        pipe.unload_lora_weights()


def check_adapters(adapters: Mapping[str, AdapterConfig], *, fuse: bool = False) -> None:
    """Raise UsageError for a name no adapter can have, a range that is empty or fused, or a file that is not there."""
    for name, adapter in adapters.items():
        if not name.isidentifier():
            raise UsageError(f"infer.adapters.{name}: name an adapter with letters, digits and underscores")
        if adapter.sigma_max is not None and adapter.sigma_min >= adapter.sigma_max:
            ends = f"sigma_min = {adapter.sigma_min:g} is not below sigma_max = {adapter.sigma_max:g}"
            raise UsageError(f"infer.adapters.{name}: {ends}; no step lies between")
        if fuse and adapter.has_range:
            raise UsageError(
                f"infer.adapters.{name}: a fused adapter works at every sigma; drop its range or infer.fuse"
            )
        if not is_trained_only(adapter):
            find_adapter(Path(adapter.path))
    check_trained_weights(adapters)


def find_adapter(path: Path) -> Path:
    """The weights file: `path` itself, or `pytorch_lora_weights.safetensors` in it."""
    file = path / WEIGHT_NAME if path.is_dir() else path
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise UsageError(f"{path}: this is a peft folder; {_CONVERT}")
        raise UsageError(f"{file}: no such adapter; give a folder with {WEIGHT_NAME}, or the file")
    if file.suffix != ".safetensors":
        raise UsageError(f"{file}: adapters are read from .safetensors files only; {_CONVERT}")
    return file


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path}: not a safetensors file: {error}") from error
    if not state:
        raise UsageError(f"{path}: this adapter is empty")
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise LatentlineError(f"{path}: {key} is not finite; train the adapter again")
    return state


def _check_against_model(path: Path, state: dict[str, Tensor], linears: Mapping[str, nn.Module]) -> None:
    """Each key names a part of an update of a linear layer of the model, in the right shape."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        if not key.startswith(PREFIX):
            raise UsageError(f"{path}: key {key!r} is not in diffusers' format; {_CONVERT}")
        module_name, part = _split(key)
        if part is None or module_name not in linears:
            raise UsageError(f"{path}: key {key!r} matches nothing in this model")
        if not isinstance(linears[module_name], nn.Linear):
            raise UsageError(f"{path}: key {key!r}: {module_name} is not a linear layer in this model")
        parts[module_name][part] = tensor
    for module_name, found in parts.items():
        linear = linears[module_name]
        assert isinstance(linear, nn.Linear)
        if not {"lora_A", "lora_B"} <= found.keys():
            missing = min({"lora_A", "lora_B"} - found.keys())
            raise UsageError(f"{path}: {module_name} has no {missing}; the adapter is incomplete")
        rank = found["lora_A"].shape[0]
        expected = {
            "lora_A": (rank, linear.in_features),
            "lora_B": (linear.out_features, rank),
            MAGNITUDE: (linear.out_features,),
        }
        for part, tensor in found.items():
            if tuple(tensor.shape) != expected[part]:
                shapes = f"{list(tensor.shape)}, the model needs {list(expected[part])}"
                raise UsageError(f"{path}: {module_name}.{part} is {shapes}: made for another model")


def _split(key: str) -> tuple[str, str | None]:
    """`transformer.<module>.<part>[.weight]` -> (module, part), part None if it is none of LoRA's or DoRA's."""
    stem = key.removeprefix(PREFIX).removesuffix(".weight")
    module_name, _, part = stem.rpartition(".")
    return module_name, part if part in ("lora_A", "lora_B", MAGNITUDE) else None


def _check_loaded(path: Path, state: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    """What the model now holds is the file: no key more, none less, the same values."""
    wanted = {_split(key): tensor for key, tensor in state.items()}
    present = {_split(PREFIX + key): tensor for key, tensor in loaded.items()}
    if unmatched := wanted.keys() ^ present.keys():
        module_name, part = min(unmatched, key=str)
        what = "was not taken by the model" if (module_name, part) in wanted else "is missing from the file"
        raise LatentlineError(f"{path}: {module_name}.{part} {what} ({len(unmatched)} such keys)")
    for key, tensor in wanted.items():
        held = present[key]
        if not torch.equal(held.cpu(), tensor.to(held.dtype)):
            raise LatentlineError(f"{path}: {'.'.join(map(str, key))} did not arrive in the model")
