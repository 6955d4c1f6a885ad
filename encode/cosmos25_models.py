"""Cosmos-Predict2.5's encoders: frames become latents, captions become contexts, latents become frames again.

Mirrors diffusers' `Cosmos2_5_PredictBasePipeline` (`_get_prompt_embeds`, `prepare_latents`) and the first
module of `CosmosTransformer3DModel` (`crossattn_proj`), which encode applies so that a context is 512 x 1,024
values and not 512 x 100,352.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from encode.config import EncodeConfig
from encode.cosmos25 import PROJECTION, SYSTEM_PROMPT, entry_shape
from encode.wan import ChunkedEncoder
from encode.wan_decoder import accelerate_decode
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.fingerprint import component_folder


class VideoEncoder:
    """The VAE on one device.

    In bfloat16 on Hopper and later the encoder is `encode.wan`'s; elsewhere it is diffusers' own.
    """

    def __init__(self, model: ModelConfig, config: EncodeConfig, device: torch.device) -> None:
        self._dtype = getattr(torch, config.dtype)
        self._device = device
        self._vae = _load_vae(model, self._dtype, device)
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


def _load_vae(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
    vae = AutoencoderKLWan.from_pretrained(model.path, revision=model.revision, subfolder="vae", torch_dtype=dtype)
    return vae.to(device).eval().requires_grad_(False)


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
        self._vae = _load_vae(model, self._dtype, device)
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
        return len(token_ids(self._tokenizer.apply_chat_template(conversation(caption), tokenize=True)))

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """Encode captions to contexts [B, L, D] in `encode.dtype`, on the CPU. Pads are real tokens: no mask."""
        ids = [
            token_ids(
                self._tokenizer.apply_chat_template(
                    conversation(caption),
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
            return torch.cat([normalise_state(state) for state in states], dim=-1).to(self._dtype).cpu()
        weight, bias = self._projection
        hidden = states[0].shape[-1]
        projected = bias.expand(len(ids), self._length, -1)
        for layer, state in enumerate(states):
            part = weight[:, layer * hidden : (layer + 1) * hidden]
            projected = projected + F.linear(normalise_state(state).float(), part)
        return F.gelu(projected).to(self._dtype).cpu()

    def null(self) -> torch.Tensor:
        """The context [L, D] of dropped text: the raw embedding times zero, projected, GELU(bias) everywhere."""
        if self._projection is None:
            return torch.zeros(self._length, self._width, dtype=self._dtype)
        return F.gelu(self._projection[1]).to(self._dtype).cpu().expand(self._length, -1).contiguous()


def conversation(caption: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": [{"type": "text", "text": caption}]},
    ]


def token_ids(output: Any) -> list[int]:
    """transformers returns a list, or since 5.0 a BatchEncoding, from `apply_chat_template`."""
    return list(output if isinstance(output, list) else output["input_ids"])


def normalise_state(state_BLD: torch.Tensor) -> torch.Tensor:
    mean = state_BLD.mean(dim=-1, keepdim=True)
    return (state_BLD - mean) / (state_BLD.std(dim=-1, keepdim=True) + 1e-8)


def _read_projection(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read only the projection's two tensors from a model's files, not the model."""
    names = [f"{PROJECTION}.0.weight", f"{PROJECTION}.0.bias"]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in set(names) & set(tensors.keys()):
                found[name] = tensors.get_tensor(name)
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f'{folder}: no tensor {missing[0]!r}; set encode.text = "raw" for a model without projection')
    return found[names[0]], found[names[1]]
