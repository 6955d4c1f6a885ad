"""diffusers' files: the adapter with its metadata, and the transformer's folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manifests.errors import UsageError
from train.adapters import WEIGHTS_NAME, read_adapter
from train.formats.adapter import Adapter, FullModel, check_finite, described_adapter, make_adapter
from train.formats.names import unmatched

MODEL_NAME = "diffusion_pytorch_model"


def read_diffusers(path: Path, *, alpha: float | None) -> Adapter:
    """Read an adapter file, or the one in a folder. alpha: for files whose metadata do not say it."""
    tensors, config = read_adapter(path)
    if not config:
        if alpha is None:
            raise UsageError(f"{path}: has no adapter metadata, so its alpha is unknown; pass --alpha")
        return make_adapter(path, tensors, alpha)
    if alpha is not None and config.get("lora_alpha") != alpha:
        raise UsageError(f"{path}: its metadata say lora_alpha {config.get('lora_alpha')}, --alpha {alpha:g} does not")
    return described_adapter(path, tensors, config)


def write_diffusers(folder: Path, adapter: Adapter) -> None:
    """Write `pytorch_lora_weights.safetensors` with the configuration in its metadata."""
    Cosmos2_5_PredictBasePipeline.save_lora_weights(
        folder,
        transformer_lora_layers={name: tensor.contiguous() for name, tensor in adapter.tensors.items()},
        weight_name=WEIGHTS_NAME,
        transformer_lora_adapter_metadata=adapter.config,
    )


def read_safetensors(path: Path, *, only_first: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, or the first of them."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in (names[:1] if only_first else names)}
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"{path}: not a readable safetensors file: {error}") from error


def read_transformer(folder: Path) -> FullModel:
    """Read all weights of a transformer's folder, in one file or several."""
    files = sorted(folder.glob(f"{MODEL_NAME}*.safetensors"))
    if not files:
        raise UsageError(f"{folder}: no {MODEL_NAME}*.safetensors there")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_safetensors(file)
    index = folder / f"{MODEL_NAME}.safetensors.index.json"
    if index.is_file() and (missing := json.loads(index.read_text())["weight_map"].keys() - tensors.keys()):
        raise unmatched(index, missing, "is in none of the files beside it")
    check_finite(folder, tensors)
    return FullModel(tensors)


def fill(transformer: torch.nn.Module, full: FullModel, where: object) -> torch.nn.Module:
    """Put the weights into an empty transformer; `UsageError` unless they are exactly its own, in its shapes."""
    check_full(transformer, full, where)
    transformer.load_state_dict(full.tensors, strict=True, assign=True)
    return transformer


def check_full(transformer: torch.nn.Module, full: FullModel, where: object) -> None:
    """Raise `UsageError` naming the first weight that is missing, unknown or of another shape."""
    expected = transformer.state_dict()
    if unknown := full.tensors.keys() - expected.keys():
        raise unmatched(where, unknown, "is not a weight of the base model")
    if missing := expected.keys() - full.tensors.keys():
        raise unmatched(where, missing, "is a weight of the base model and missing")
    for name, tensor in full.tensors.items():
        if tensor.shape != expected[name].shape:
            raise UsageError(f"{where}: {name} is {list(tensor.shape)}, the base has {list(expected[name].shape)}")
