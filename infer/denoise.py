"""Cosmos-Predict2.5's denoising loop, as `Cosmos2_5_PredictBasePipeline` computes it, in less time.

What differs from the pipeline's own call:
- Prompts come projected, [1, L, D]: the transformer's text projection runs once a prompt, not twice a step.
- The prompt and the negative prompt go through the transformer as one batch, where memory allows; what comes before
  the first block's cross-attention is the same for both and computed once.
- Only the frames that condition the video go through the VAE: its encoder is causal.
- Attention runs by the kernel that is fastest at the video's size.
- Several ranks may share the work: a prompt each, or an equal run of the tokens each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.attention import Kernel, choose_kernel, use_kernel
from train.context_parallel import Context, gather_first, sharing

PROJECTION = "crossattn_proj"

_WORKING_VALUES = 24
"""What a block needs while it runs, in values a token and hidden channel; the MLP's two widest tensors lead."""


@torch.no_grad()
def denoise(
    pipe: Any,
    contexts_1LD: Sequence[Tensor],
    *,
    condition_BCTHW: Tensor | None,
    height: int,
    width: int,
    num_frames: int,
    num_steps: int,
    guidance: float,
    generator: torch.Generator,
    conditioning_timestep: float,
    on_step: Callable[[], None],
    on_sigma: Callable[[float], None] | None = None,
    guidance_ranks: Context | None = None,
    context_ranks: Context | None = None,
    image_context_1MC: Tensor | None = None,
    together: bool | None = None,
) -> Tensor:
    """Sample normalised latents [1, C, T, H / 8, W / 8], float32.

    contexts_1LD: of the prompt and, where guidance is on, of the negative prompt; projected if the model projects.
    condition_BCTHW: 4k + 1 clean frames in [-1, 1] that the video begins with, or None. conditioning_timestep: of
    those frames, negative for that of the others. generator: of the initial noise. on_sigma: called with a step's
    sigma before its predictions. guidance_ranks: two ranks that predict for one prompt each. context_ranks: ranks that
    share the tokens of each prediction. All ranks call this with the same values and return the same latents.
    image_context_1MC: of the prompt, for models that take one; the negative prompt's is zeros. together: the prompt and
    the negative prompt as one batch; None: where memory allows it.
    """
    transformer, scheduler = pipe.transformer, pipe.scheduler
    device, dtype = contexts_1LD[0].device, transformer.dtype
    latents, clean, mask, indicator = pipe.prepare_latents(
        video=condition_BCTHW,
        batch_size=1,
        num_channels_latents=transformer.config.in_channels - 1,
        height=height,
        width=width,
        num_frames_in=0 if condition_BCTHW is None else condition_BCTHW.shape[2],
        num_frames_out=num_frames,
        dtype=torch.float32,
        device=device,
        generator=generator,
    )
    clean = F.pad(clean, (0, 0, 0, 0, 0, latents.shape[2] - clean.shape[2]))
    mask = mask.to(dtype)
    clean_velocity = (latents - clean) * mask
    padding_mask = latents.new_zeros(1, 1, height, width, dtype=dtype)
    contexts_BLD = torch.cat(list(contexts_1LD))
    images_BMC = None if image_context_1MC is None else _with_zeros(image_context_1MC, len(contexts_BLD))
    is_split = guidance_ranks is not None and len(contexts_BLD) > 1
    if guidance_ranks is not None and is_split:
        contexts_BLD = contexts_BLD[guidance_ranks.rank, None]
        images_BMC = None if images_BMC is None else images_BMC[guidance_ranks.rank, None]
    if together is None:
        together = _fits(transformer, len(contexts_BLD), latents)
    batch_size = len(contexts_BLD) if together else 1
    batches = [slice(first, first + batch_size) for first in range(0, len(contexts_BLD), batch_size)]

    def predict(noisy: Tensor, timestep: Tensor, prompts: slice) -> Tensor:
        given = {} if images_BMC is None else {"image_context": images_BMC[prompts]}
        return transformer(
            hidden_states=noisy,
            condition_mask=mask,
            timestep=timestep,
            encoder_hidden_states=contexts_BLD[prompts],
            padding_mask=padding_mask,
            return_dict=False,
            **given,
        )[0]

    scheduler.set_timesteps(num_steps, device=device)
    with _projected(transformer), sharing(context_ranks), use_kernel(_kernel_for(transformer, latents, batch_size)):
        for index, step_time in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[index].expand(1).to(device, torch.float32)
            if on_sigma is not None:
                on_sigma(float(sigma))
            timestep = sigma
            if conditioning_timestep >= 0:
                timestep = indicator * conditioning_timestep + (1 - indicator) * sigma.view(1, 1, 1, 1, 1)
            noisy = (mask * clean + (1 - mask) * latents).to(dtype)
            parts = [predict(noisy, timestep, prompts) for prompts in batches]
            predicted = torch.cat(parts)
            if guidance_ranks is not None and is_split:
                predicted = gather_first(predicted, guidance_ranks)
            velocities = [clean_velocity + velocity * (1 - mask) for velocity in predicted.split(1)]
            velocity = velocities[0]
            if len(velocities) > 1:
                velocity = velocity + guidance * (velocity - velocities[1])
            latents = scheduler.step(velocity, step_time, latents, return_dict=False)[0]
            on_step()
    return latents


@torch.no_grad()
def decode(pipe: Any, latents_BCTHW: Tensor, num_frames: int) -> Tensor:
    """Decode normalised latents to frames [num_frames, H, W, 3], float32 in 0 to 1, on the VAE's device."""
    mean, std = (value.to(latents_BCTHW) for value in (pipe.latents_mean, pipe.latents_std))
    video = pipe.vae.decode((latents_BCTHW / std + mean).to(pipe.vae.dtype), return_dict=False)[0]
    video = pipe.video_processor.postprocess_video(pipe._match_num_frames(video, num_frames), output_type="pt")[0]
    return video.permute(0, 2, 3, 1).float()


def to_bytes(video_THWC: Tensor) -> np.ndarray:
    """Frames in 0 to 1 as uint8, rounded, in host memory."""
    return (video_THWC * 255.0).round().to(torch.uint8).cpu().numpy()


@torch.no_grad()
def project(transformer: nn.Module, embeds_BLD: Tensor) -> Tensor:
    """Apply the transformer's text projection, if it has one."""
    return getattr(transformer, PROJECTION)(embeds_BLD) if hasattr(transformer, PROJECTION) else embeds_BLD


def _with_zeros(image_1MC: Tensor, num_prompts: int) -> Tensor:
    """The prompt's image context, and zeros for the negative prompt."""
    return torch.cat([image_1MC, *[torch.zeros_like(image_1MC)] * (num_prompts - 1)])


@contextmanager
def _projected(transformer: nn.Module) -> Iterator[None]:
    """Let the transformer take contexts that are projected already."""
    projection = getattr(transformer, PROJECTION, None)
    if projection is not None:
        setattr(transformer, PROJECTION, nn.Identity())
    try:
        yield
    finally:
        if projection is not None:
            setattr(transformer, PROJECTION, projection)


def _num_tokens(transformer: Any, latents_BCTHW: Tensor) -> int:
    _, rows, columns = transformer.config.patch_size
    return latents_BCTHW[0, 0].numel() // (rows * columns)


def _fits(transformer: Any, batch_size: int, latents_BCTHW: Tensor) -> bool:
    """Whether a batch of this size fits in what the device has free; on a CPU, always."""
    if latents_BCTHW.device.type != "cuda":
        return True
    config = transformer.config
    values = _num_tokens(transformer, latents_BCTHW) * config.num_attention_heads * config.attention_head_dim
    free, _ = torch.cuda.mem_get_info(latents_BCTHW.device)
    unused = torch.cuda.memory_reserved(latents_BCTHW.device) - torch.cuda.memory_allocated(latents_BCTHW.device)
    return batch_size * values * transformer.dtype.itemsize * _WORKING_VALUES < free + unused


def _kernel_for(transformer: Any, latents_BCTHW: Tensor, batch_size: int) -> Kernel:
    config = transformer.config
    tokens = _num_tokens(transformer, latents_BCTHW)
    shape = (batch_size, tokens, config.num_attention_heads, config.attention_head_dim)
    return _measured_kernel(shape, transformer.dtype, latents_BCTHW.device)


@functools.cache
def _measured_kernel(shape_BNHD: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Kernel:
    return choose_kernel(shape_BNHD, dtype, device, backward=False)
