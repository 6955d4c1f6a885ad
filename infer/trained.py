"""Trained weights other than LoRA and DoRA onto a pipeline's transformer: temporal adapters, and weights of the base.

They lie in an adapter's folder as `trained_weights.safetensors`, beside its LoRA or alone, and replace what the model
has; so they cannot be scaled, and two files may not hold the same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from infer.config import AdapterConfig
from manifests.errors import UsageError
from train.adapters import WEIGHTS_NAME
from train.trained import TRAINED_NAME, install_trained


def load_trained_weights(pipe: Any, adapters: Mapping[str, AdapterConfig]) -> dict[str, AdapterConfig]:
    """Install the trained weights of the adapters that have some; return the adapters that have a LoRA or DoRA.

    Raises UsageError for a weight other than 1, a tensor two adapters hold, or one without a place in the model.
    """
    holders: dict[str, str] = {}
    for name, adapter in adapters.items():
        path = _file(adapter)
        if path is None:
            continue
        if adapter.weight != 1:
            raise UsageError(
                f"infer.adapters.{name}.weight: {path} replaces weights of the model, so it cannot be scaled; make it 1"
            )
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key in holders:
                    raise UsageError(f"infer.adapters: {holders[key]} and {name} both hold {key}; use one of them")
                holders[key] = name
        install_trained(pipe.transformer, path)
    return {name: adapter for name, adapter in adapters.items() if not is_trained_only(adapter)}


def is_trained_only(adapter: AdapterConfig) -> bool:
    """Say whether an adapter has trained weights and no LoRA or DoRA."""
    path = _file(adapter)
    return path is not None and (path == Path(adapter.path) or not (path.parent / WEIGHTS_NAME).is_file())


def _file(adapter: AdapterConfig) -> Path | None:
    path = Path(adapter.path)
    file = path / TRAINED_NAME if path.is_dir() else path
    return file if file.name == TRAINED_NAME and file.is_file() else None
