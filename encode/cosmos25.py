"""Cosmos-Predict2.5 in stage 1: what turns frames into latents and captions into contexts.

Mirrors diffusers' `Cosmos2_5_PredictBasePipeline` (`_get_prompt_embeds`, `prepare_latents`) and the first
module of `CosmosTransformer3DModel` (`crossattn_proj`), which encode applies so that a context is 512 x 1,024
values and not 512 x 100,352.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import DEFAULT_NEGATIVE_PROMPT
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from encode.config import EncodeConfig
from encode.decode import PAD_POLICY, PIXEL_POLICY
from encode.wan import VERSION, ChunkedEncoder
from encode.wan_decoder import accelerate_decode
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.fingerprint import component_folder, files_digest, weights_digest
from manifests.keys import digest

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4
SIZE_MULTIPLE = 16
PROJECTION = "crossattn_proj.0"
_BOOKKEEPING = ("architectures", "dtype", "torch_dtype", "transformers_version")
SYSTEM_PROMPT = "You are a helpful assistant who will provide prompts to an image generator."

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "TextEncoder",
    "VideoDecoder",
    "VideoEncoder",
    "check_geometry",
    "context_parts",
    "entry_shape",
    "latents_parts",
]


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
        "encoder": VERSION,
    }


def context_parts(model: ModelConfig, config: EncodeConfig) -> dict[str, Any]:
    """Everything about the producer of contexts that determines their bytes.

    `projection` is the digest of the DiT's `crossattn_proj`, or None where contexts are stored raw.
    """
    text_encoder = component_folder(model, "text_encoder")
    projection = None
    if config.text == "projected":
        try:
            projection = weights_digest(component_folder(model, "transformer"), "crossattn_proj")
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


class VideoEncoder:
    """The VAE on one device.

    In bfloat16 on Hopper and later the encoder is `encode.wan`'s; elsewhere it is diffusers' own.
    """

    def __init__(self, model: ModelConfig, config: EncodeConfig, device: torch.device) -> None:
        self._dtype = getattr(torch, config.dtype)
        self._device = device
        self._vae = AutoencoderKLWan.from_pretrained(
            model.path, revision=model.revision, subfolder="vae", torch_dtype=self._dtype
        )
        self._vae.to(device).eval().requires_grad_(False)
        self.latents_mean: list[float] = list(self._vae.config.latents_mean)
        self._fast = ChunkedEncoder(self._vae) if _has_fast_kernels(device, self._dtype) else None

    @torch.no_grad()
    def encode(self, frames_THWC: np.ndarray) -> torch.Tensor:
        """Encode uint8 RGB [T, H, W, 3] to the unnormalised posterior mean [C, T', H/8, W/8], on the CPU."""
        if self._fast is not None:
            return self._fast.encode(torch.from_numpy(frames_THWC)).contiguous().cpu()
        pixels = torch.from_numpy(frames_THWC).to(self._device).permute(3, 0, 1, 2).unsqueeze(0)
        video_BCTHW = (pixels.float() / 127.5 - 1.0).to(self._dtype)
        return self._vae.encode(video_BCTHW).latent_dist.mode()[0].cpu()


def accelerate_vae(vae: AutoencoderKLWan) -> None:
    """Give a VAE on its device `encode.wan_decoder`'s decode, in bfloat16 on Hopper and later; else leave it alone."""
    if _has_fast_kernels(vae.device, vae.dtype):
        accelerate_decode(vae)


def _has_fast_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)


class VideoDecoder:
    """The VAE's other half on one device: latents back to pictures."""

    def __init__(self, model: ModelConfig, config: EncodeConfig, device: torch.device) -> None:
        self._dtype = getattr(torch, config.dtype)
        self._device = device
        self._vae = AutoencoderKLWan.from_pretrained(
            model.path, revision=model.revision, subfolder="vae", torch_dtype=self._dtype
        )
        self._vae.to(device).eval().requires_grad_(False)
        accelerate_vae(self._vae)

    @torch.no_grad()
    def decode(self, latents_CTHW: torch.Tensor) -> np.ndarray:
        """Decode unnormalised latents [C, T', H/8, W/8] to uint8 RGB frames [T, H, W, 3]."""
        latents_BCTHW = latents_CTHW.unsqueeze(0).to(self._device, self._dtype)
        video_CTHW = self._vae.decode(latents_BCTHW).sample[0].float()
        frames_THWC = ((video_CTHW + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
        return frames_THWC.cpu().numpy()


class TextEncoder:
    """Tokenizer, Qwen2.5-VL and, unless `encode.text = "raw"`, the DiT's context projection on one device.

    Hidden states of every layer are normalised per token over their width and projected one layer at a time in
    float32, so the concatenation of 28 x 3,584 values a token is only ever built for raw contexts.
    """

    def __init__(self, model: ModelConfig, config: EncodeConfig, device: torch.device) -> None:
        self._dtype = getattr(torch, config.dtype)
        self._device = device
        self._length = config.text_length
        self._tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision, subfolder="tokenizer")
        self._encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model.path, revision=model.revision, subfolder="text_encoder", torch_dtype=self._dtype
        )
        self._encoder.to(device).eval().requires_grad_(False)
        self._width = entry_shape("context", model, config)[1]
        self._projection: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.text == "projected":
            self._projection = self._read(component_folder(model, "transformer"))

    def _read(self, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = _read_projection(folder)
        return weight.to(self._device, torch.float32), bias.to(self._device, torch.float32)

    def add_projection(self, folder: Path) -> None:
        """Project with another model's `crossattn_proj` too: contexts become [L, 2 D], its part last."""
        assert self._projection is not None
        second = self._read(folder)
        self._projection = tuple(torch.cat(parts) for parts in zip(self._projection, second, strict=True))

    def num_tokens(self, caption: str) -> int:
        """Tokens of the caption in its chat template, before padding or truncation to `encode.text_length`."""
        return len(_token_ids(self._tokenizer.apply_chat_template(_conversation(caption), tokenize=True)))

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Encode captions to contexts [B, L, D] in `encode.dtype`, on the CPU. Pads are real tokens: no mask."""
        ids = [
            _token_ids(
                self._tokenizer.apply_chat_template(
                    _conversation(caption),
                    tokenize=True,
                    add_generation_prompt=False,
                    max_length=self._length,
                    truncation=True,
                    padding="max_length",
                )
            )
            for caption in captions
        ]
        states = self._encoder(torch.tensor(ids, device=self._device), output_hidden_states=True).hidden_states[1:]
        if self._projection is None:
            return torch.cat([_normalise(state) for state in states], dim=-1).to(self._dtype).cpu()
        weight, bias = self._projection
        hidden = states[0].shape[-1]
        projected = bias.expand(len(ids), self._length, -1)
        for layer, state in enumerate(states):
            part = weight[:, layer * hidden : (layer + 1) * hidden]
            projected = projected + F.linear(_normalise(state).float(), part)
        return F.gelu(projected).to(self._dtype).cpu()

    def null(self) -> torch.Tensor:
        """The context [L, D] of dropped text: the raw embedding times zero, projected, GELU(bias) everywhere."""
        if self._projection is None:
            return torch.zeros(self._length, self._width, dtype=self._dtype)
        return F.gelu(self._projection[1]).to(self._dtype).cpu().expand(self._length, -1).contiguous()


def _conversation(caption: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": [{"type": "text", "text": caption}]},
    ]


def _token_ids(output: Any) -> list[int]:
    """transformers returns a list, or since 5.0 a BatchEncoding, from `apply_chat_template`."""
    return list(output if isinstance(output, list) else output["input_ids"])


def _normalise(state_BLD: torch.Tensor) -> torch.Tensor:
    mean = state_BLD.mean(dim=-1, keepdim=True)
    return (state_BLD - mean) / (state_BLD.std(dim=-1, keepdim=True) + 1e-8)


def _read_projection(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read only the projection's two tensors from a model's files, not the model."""
    names = [f"{PROJECTION}.weight", f"{PROJECTION}.bias"]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in set(names) & set(tensors.keys()):
                found[name] = tensors.get_tensor(name)
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f'{folder}: no tensor {missing[0]!r}; set encode.text = "raw" for a model without projection')
    return found[names[0]], found[names[1]]
