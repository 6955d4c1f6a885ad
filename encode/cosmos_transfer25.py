"""Cosmos-Transfer2.5 in stage 1: what its entries are named by. What Predict has, and hints, through the same VAE.

Contexts are projected for the base and for the controlnet, which has a `crossattn_proj` of its own: once where the two
are equal, else side by side, [L, 2 D], the base's first. `models` has the encoders.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from encode import cosmos25
from encode.config import EncodeConfig
from encode.cosmos25 import (
    DEFAULT_NEGATIVE_PROMPT,
    PROJECTION,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    check_sizes,
    latents_parts,
)
from manifests.config import ModelConfig
from manifests.fingerprint import component_folder, weights_digest
from manifests.hints import POLICY

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "SPATIAL_STRIDE",
    "TEMPORAL_STRIDE",
    "check_geometry",
    "context_parts",
    "entry_shape",
    "hint_parts",
    "latents_parts",
    "models",
]


def models() -> ModuleType:
    """The module with Predict's encoders, as this family has them, and `HintEncoder`; imported when first asked."""
    from encode import cosmos_transfer25_models

    return cosmos_transfer25_models


def check_geometry(config: EncodeConfig) -> None:
    """Raise `UsageError` unless height and width are divisible by 16 and num_frames is 4k+1."""
    check_sizes(config)


def context_parts(model: ModelConfig, config: EncodeConfig) -> dict[str, Any]:
    """Everything about the producer of contexts that determines their bytes, both projections included."""
    control = None
    if config.text == "projected":
        control = weights_digest(component_folder(model, "controlnet"), PROJECTION)
    return cosmos25.context_parts(model, config) | {"control_projection": control}


def hint_parts(model: ModelConfig, config: EncodeConfig) -> dict[str, Any]:
    """Everything about the producer of hints that determines their bytes, but their kinds and parameters."""
    return latents_parts(model, config) | {"hints": POLICY}


def entry_shape(kind: str, model: ModelConfig, config: EncodeConfig) -> tuple[int, ...]:
    """Shape of an entry's tensor: latents and hint [C, T, H, W], context [L, D] or [L, 2 D]."""
    shape = cosmos25.entry_shape("latents" if kind == "hint" else kind, model, config)
    return (shape[0], 2 * shape[1]) if kind == "context" and has_two_projections(model, config) else shape


def has_two_projections(model: ModelConfig, config: EncodeConfig) -> bool:
    """Say whether base and controlnet project text differently."""
    if config.text == "raw":
        return False
    folders: list[Path] = [component_folder(model, name) for name in ("transformer", "controlnet")]
    first, second = (weights_digest(folder, PROJECTION) for folder in folders)
    return first != second
