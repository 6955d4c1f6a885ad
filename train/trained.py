"""The trained tensors by name: gathered from the ranks, stored, and put back.

Names are the base's own, and `transformer_blocks.3.temporal_adapter.up.weight` and the like for temporal adapters; what
peft inserts into names is left out. LoRA and DoRA have a file of their own that stock diffusers loads
(`train.adapters`); every other trained tensor is in `trained_weights.safetensors`, float32, whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from manifests.errors import UsageError
from train.temporal import ADAPTER, TemporalAdapter

TRAINED_NAME = "trained_weights.safetensors"
LORA = ".lora_"


def is_added(name: str) -> bool:
    """Say whether a parameter is an adapter's, not the base's."""
    return LORA in name or f".{ADAPTER}." in name


def parameter_names(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its name without peft's insertions, in a fixed order."""
    return {
        name.replace(".base_layer.", ".").replace(".default", ""): parameter
        for name, parameter in transformer.named_parameters()
    }


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in a fixed order; those FSDP splits are DTensors."""
    return {name: parameter for name, parameter in parameter_names(transformer).items() if parameter.requires_grad}


def stored_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """What `trained_weights.safetensors` holds: trained weights of the base, and temporal adapters whole."""
    return {
        name: parameter
        for name, parameter in parameter_names(transformer).items()
        if LORA not in name and (parameter.requires_grad or is_added(name))
    }


def to_host(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU, one after the other; all ranks that split them must ask.

    keep: False on a rank that only takes part; it gets nothing, and its host memory is left alone.
    """
    copies = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            copies[name] = tensor.to("cpu", copy=True).contiguous()
    return copies


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, equal on every rank, laid out as `parameter` is; nothing is sent."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def save_trained(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write trained tensors; the caller syncs and renames."""
    safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})


def load_trained(transformer: nn.Module, path: Path) -> None:
    """Put the tensors of a file in place, each laid out as its parameter is.

    Strict for what trains here: `UsageError`, and no value changed, unless the file holds exactly the tensors of
    `stored_parameters`, in their shapes.
    """
    tensors = _read(path)
    places = stored_parameters(transformer)
    missing, unexpected = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or unexpected:
        raise UsageError(
            f"{path}: {len(unexpected)} of its tensors are none that train and {len(missing)} that train are missing "
            f"(first: {(unexpected + missing)[0]})"
        )
    _check_shapes(path, tensors, places)
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(split_like(tensors[name], parameter))


def install_trained(transformer: nn.Module, path: Path) -> None:
    """Make an untrained transformer the one a file was saved from: add its temporal adapters, replace its weights.

    For inference; the transformer is on one device and has the faster forward. Raises `UsageError` if a tensor of the
    file has no place in the model.
    """
    tensors = _read(path)
    device, dtype = next((p.device, p.dtype) for p in transformer.parameters())
    end = f".{ADAPTER}.down.weight"
    for name in [name for name in tensors if name.endswith(end)]:
        block_name = name.removesuffix(end)
        width, hidden = tensors[name].shape
        try:
            block = transformer.get_submodule(block_name)
        except AttributeError:
            raise UsageError(f"{path}: {name} has no place in this model") from None
        setattr(block, ADAPTER, TemporalAdapter(hidden, width).to(device, dtype).requires_grad_(False))
    places = parameter_names(transformer)
    strangers = sorted(tensors.keys() - places.keys())
    if strangers:
        raise UsageError(f"{path}: {len(strangers)} of its tensors have no place in this model (first: {strangers[0]})")
    _check_shapes(path, tensors, places)
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a file; `UsageError` if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not a readable safetensors file: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not a readable safetensors file: {error}") from error


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape:
            raise UsageError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model's is {list(places[name].shape)}"
            )
