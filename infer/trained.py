"""Trained weights other than LoRA and DoRA onto a pipeline's transformer: temporal adapters, and weights of the base.

They lie in an adapter's folder as `trained_weights.safetensors`, beside its LoRA or alone, and replace what the model
has; so they cannot be scaled, and two files may not hold the same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.config import AdapterConfig
from manifests.errors import UsageError
from train.adapters import WEIGHTS_NAME
from train.trained import TRAINED_NAME, install_trained, tensor_names


def load_trained_weights(pipe: Any, adapters: Mapping[str, AdapterConfig]) -> dict[str, AdapterConfig]:
    """Install the trained weights of the adapters that have some; return the adapters that have a LoRA or DoRA.

    Raises UsageError for a tensor that has no place in the model.
    """
    for adapter in adapters.values():
        if path := trained_file(adapter):
            install_trained(pipe.transformer, path)
    return {name: adapter for name, adapter in adapters.items() if not is_trained_only(adapter)}


def check_trained_weights(adapters: Mapping[str, AdapterConfig]) -> None:
    """Raise UsageError for trained weights that are scaled, kept to a range of sigma, or held by two adapters."""
    holders: dict[str, str] = {}
    for name, adapter in adapters.items():
        path = trained_file(adapter)
        if path is None:
            continue
        if adapter.weight != 1:
            raise UsageError(
                f"infer.adapters.{name}.weight: {path} replaces weights of the model, so it cannot be scaled; make it 1"
            )
        if adapter.has_range:
            raise UsageError(
                f"infer.adapters.{name}: {path} replaces weights of the model, so it works at every sigma; drop its "
                "sigma_min and sigma_max"
            )
        for key in tensor_names(path):
            if key in holders:
                raise UsageError(f"infer.adapters: {holders[key]} and {name} both hold {key}; use one of them")
            holders[key] = name


def is_trained_only(adapter: AdapterConfig) -> bool:
    """Say whether an adapter has trained weights and no LoRA or DoRA."""
    path = trained_file(adapter)
    return path is not None and (path == Path(adapter.path) or not (path.parent / WEIGHTS_NAME).is_file())


def trained_file(adapter: AdapterConfig) -> Path | None:
    """The file of its trained weights, None if it has none."""
    path = Path(adapter.path)
    file = path / TRAINED_NAME if path.is_dir() else path
    return file if file.name == TRAINED_NAME and file.is_file() else None
