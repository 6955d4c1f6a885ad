"""Cosmos-Predict2.5 in stage 1: what its entries are named by and how large they are.

No model is loaded here, nor the libraries of models: planning needs neither. `models` has the encoders.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from encode.config import EncodeConfig
from encode.decode import PAD_POLICY, PIXEL_POLICY
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.fingerprint import component_folder, files_digest, weights_digest
from manifests.keys import digest

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4
SIZE_MULTIPLE = 16
PROJECTION = "crossattn_proj"
ENCODER_VERSION = 1
"""Raised whenever `encode.wan` would give other bytes for the same frames."""

SYSTEM_PROMPT = "You are a helpful assistant who will provide prompts to an image generator."
DEFAULT_NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, over-saturation, "
    "shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, underexposed and overexposed "
    "scenes, poor color balance, washed out colors, choppy sequences, jerky movements, low frame rate, artifacting, "
    "color banding, unnatural transitions, outdated special effects, fake elements, unconvincing visuals, poorly "
    "edited content, jump cuts, visual noise, and flickering. Overall, the video is of poor quality."
)
"""What the model's makers use; equal to diffusers', whose module takes seconds and half a gigabyte to import."""

_BOOKKEEPING = ("architectures", "dtype", "torch_dtype", "transformers_version")


def models() -> ModuleType:
    """The module with `VideoEncoder`, `VideoDecoder`, `TextEncoder` and `accelerate_vae`, imported when first asked."""
    from encode import cosmos25_models

    return cosmos25_models


def check_geometry(config: EncodeConfig) -> None:
    """Raise `UsageError` unless height and width are divisible by 16 and num_frames is 4k+1, without hints."""
    if config.hints.kinds or config.resize != "stretch":
        what = 'encode.resize = "pad"' if config.resize != "stretch" else "encode.hints"
        raise UsageError(f'{what}: Cosmos-Predict2.5 takes none; set model.family = "cosmos-transfer2.5", or drop it')
    check_sizes(config)


def check_sizes(config: EncodeConfig) -> None:
    """Raise `UsageError` unless height and width are divisible by 16 and num_frames is 4k+1."""
    for name, value in (("height", config.height), ("width", config.width)):
        if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
            low = max(SIZE_MULTIPLE, value // SIZE_MULTIPLE * SIZE_MULTIPLE)
            raise UsageError(
                f"encode.{name} = {value} is not divisible by {SIZE_MULTIPLE}; near: {low}, {low + SIZE_MULTIPLE}"
            )
    frames = config.num_frames
    if frames < 1 or (frames - 1) % TEMPORAL_STRIDE:
        low = max(1, (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
        raise UsageError(
            f"encode.num_frames = {frames} is not 4k+1, as the causal VAE needs; near values: {low}, "
            f"{low + TEMPORAL_STRIDE}"
        )


def latents_parts(model: ModelConfig, config: EncodeConfig) -> dict[str, Any]:
    """Everything about the producer of latents that determines their bytes."""
    folder = component_folder(model, "vae")
    vae = _config(folder)
    return {
        "family": model.family,
        "vae": weights_digest(folder),
        "vae_config": digest(_architecture(vae)),
        "latents_mean": vae["latents_mean"],
        "latents_std": vae["latents_std"],
        "channels": vae["z_dim"],
        "strides": [TEMPORAL_STRIDE, SPATIAL_STRIDE, SPATIAL_STRIDE],
        "dtype": config.dtype,
        "pixels": PIXEL_POLICY if config.resize == "stretch" else PAD_POLICY,
        "range": "rgb uint8 / 127.5 - 1",
        "value": "posterior mean, unnormalised",
        "encoder": ENCODER_VERSION,
    }


def context_parts(model: ModelConfig, config: EncodeConfig) -> dict[str, Any]:
    """Everything about the producer of contexts that determines their bytes.

    `projection` is the digest of the DiT's `crossattn_proj`, or None where contexts are stored raw.
    """
    text_encoder = component_folder(model, "text_encoder")
    projection = None
    if config.text == "projected":
        try:
            projection = weights_digest(component_folder(model, "transformer"), PROJECTION)
        except UsageError as error:
            raise UsageError(f'{error}; set encode.text = "raw" for a model without text projection') from error
    return {
        "family": model.family,
        "text_encoder": weights_digest(text_encoder),
        "text_encoder_config": digest(_architecture(_config(text_encoder))),
        "tokenizer": files_digest(component_folder(model, "tokenizer"), ("*.json", "*.jinja", "*.txt")),
        "template": digest(SYSTEM_PROMPT),
        "length": config.text_length,
        "projection": projection,
        "dtype": config.dtype,
    }


def entry_shape(kind: str, model: ModelConfig, config: EncodeConfig) -> tuple[int, ...]:
    """Shape of an entry's tensor: latents [C, T, H, W], context [L, D]."""
    if kind == "latents":
        vae = _config(component_folder(model, "vae"))
        latent_frames = (config.num_frames - 1) // TEMPORAL_STRIDE + 1
        return vae["z_dim"], latent_frames, config.height // SPATIAL_STRIDE, config.width // SPATIAL_STRIDE
    transformer = _config(component_folder(model, "transformer"))
    projected = config.text == "projected"
    width = transformer["encoder_hidden_states_channels" if projected else "crossattn_proj_in_channels"]
    return config.text_length, width


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'config.json'}: cannot read this file; is it a diffusers checkpoint?") from error


def _architecture(config: Any) -> Any:
    """A config without what changes no output: who saved it, where from, in which dtype."""
    if isinstance(config, dict):
        return {
            name: _architecture(value)
            for name, value in config.items()
            if not name.startswith("_") and name not in _BOOKKEEPING
        }
    return [_architecture(item) for item in config] if isinstance(config, list) else config
