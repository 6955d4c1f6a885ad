"""Cosmos-Predict2.5: all that is specific to this family when generating.

A family file of `infer` has: DEFAULT_NEGATIVE_PROMPT, check_request, num_tokens, latent_frames_of, require_guardrail,
load_pipeline, check_prompt, encode_prompt, release_text, generate_frames. The parts are those of diffusers'
`Cosmos2_5_PredictBasePipeline`; its transformer gets the trainer's faster forward, and its loop is `infer.denoise`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import Cosmos2_5_PredictBasePipeline
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import DEFAULT_NEGATIVE_PROMPT
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from infer.cosmos25_sizes import FRAME_STRIDE, check_request, latent_frames_of, num_tokens
from infer.denoise import PROJECTION, decode, denoise, project, to_bytes
from infer.loading import NoGuardrail, build_guardrail, check_checkpoint, quiet_about, require_guardrail
from infer.request import Request
from infer.team import Team
from infer.video import Frames, read_frames
from manifests.config import ModelConfig
from manifests.errors import LatentlineError
from train.activation import set_levels
from train.dit import accelerate

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "SYSTEM_PROMPT",
    "check_prompt",
    "check_request",
    "encode_prompt",
    "generate_frames",
    "latent_frames_of",
    "load_decoder",
    "load_pipeline",
    "num_tokens",
    "preview",
    "release_text",
    "require_guardrail",
]

SYSTEM_PROMPT = "You are a helpful assistant who will provide prompts to an image generator."
"""Of the chat the text encoder reads; the pipeline writes it itself."""

TEXT_LENGTH = 512

PIPELINE_CLASS = "Cosmos2_5_PredictBasePipeline"

logger = logging.getLogger(__name__)


def load_pipeline(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    guardrail: bool,
    accelerate_vae: Callable[[Any], None] = lambda vae: None,
) -> Cosmos2_5_PredictBasePipeline:
    """The pipeline on `device`, all parts in `dtype`, its transformer with the faster forward.

    On CUDA the transformer's blocks are compiled, once for each size of video.
    guardrail: check prompts and videos with NVIDIA's `cosmos_guardrail`; False lets everything pass.
    accelerate_vae: called with the VAE on its device, may give it a faster `decode`.
    Raises UsageError if the guardrail or the checkpoint is not there, or is of another class.
    """
    if guardrail:
        require_guardrail()
    check_checkpoint(model, PIPELINE_CLASS)
    checker = build_guardrail() if guardrail else NoGuardrail()
    with quiet_about("safety_checker"):
        pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(
            model.path, revision=model.revision, safety_checker=checker, dtype=dtype
        )
    pipe.set_progress_bar_config(disable=True)
    blocks = accelerate(pipe.transformer).transformer_blocks
    if device.type == "cuda":
        set_levels(list(blocks), ["none"] * len(blocks), compiled=True)
    pipe.to(device)
    accelerate_vae(pipe.vae)
    return pipe


def check_prompt(pipe: Any, prompt: str) -> None:
    """Raise LatentlineError if the guardrail rejects the prompt.

    The pipeline does this only when it is given text, and it is given embeddings here.
    """
    if not pipe.safety_checker.check_text_safety(prompt):
        raise LatentlineError(f"the guardrail rejects this prompt; change it: {prompt!r}")


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """The prompt's context, [1, 512, D] on the CPU: the text encoder's states, projected if the model projects."""
    return project(pipe.transformer, embed_prompt(pipe, prompt)).cpu()


@torch.no_grad()
def embed_prompt(pipe: Any, prompt: str) -> Tensor:
    """The text encoder's states of a prompt, [1, 512, D], as the pipeline concatenates them."""
    chat = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
    num_tokens = len(pipe.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"])
    if num_tokens > TEXT_LENGTH:
        logger.warning("prompt cut to %d of its %d tokens: %.60s...", TEXT_LENGTH, num_tokens, prompt)
    embeds_BLD, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    return embeds_BLD


def release_text(pipe: Any) -> None:
    """Free what only `encode_prompt` needs: the text encoder and the transformer's text projection."""
    pipe.text_encoder = None
    if hasattr(pipe.transformer, PROJECTION):
        setattr(pipe.transformer, PROJECTION, torch.nn.Identity())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def generate_frames(
    pipe: Any,
    request: Request,
    context: Tensor,
    negative_context: Tensor | None,
    *,
    conditioning_timestep: float,
    on_step: Callable[[], None],
    on_sigma: Callable[[float], None] | None = None,
    previous_THWC: Frames | None = None,
    team: Team | None = None,
    image_context: Tensor | None = None,
) -> Frames | None:
    """One video, uint8 [num_frames, height, width, 3]; None on ranks of `team` that do not lead it.

    context, negative_context: from `encode_prompt`, None where guidance is off (1 or less). conditioning_timestep:
    of the clean frames, on the sigma scale; negative gives them the sigma of the others. on_step, on_sigma: called
    after each denoising step, and with its sigma before. previous_THWC: 4k+1 frames to begin with, instead of the
    request's image or video. image_context: [1, M, C], of models that take one. Noise is float32, drawn on the CPU from
    `request.seed`, the same on every device.
    """
    frames: list[Image.Image] | None = None
    if previous_THWC is not None:
        frames = [Image.fromarray(frame) for frame in previous_THWC]
    elif request.image or request.video:
        frames = [_load_image(request)] if request.image else _load_video(request)
    condition_BCTHW = None
    if frames is not None:
        pixels_BCTHW = pipe.video_processor.preprocess_video(frames, request.height, request.width)
        condition_BCTHW = pixels_BCTHW.to(pipe.vae.device, pipe.vae.dtype)
    latents_BCTHW = denoise(
        pipe,
        [part.to(pipe.vae.device) for part in (context, negative_context) if part is not None],
        condition_BCTHW=condition_BCTHW,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_steps=request.num_steps,
        guidance=request.guidance,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        conditioning_timestep=conditioning_timestep,
        on_step=on_step,
        on_sigma=on_sigma,
        guidance_ranks=team and team.guidance,
        context_ranks=team and team.context,
        image_context_1MC=None if image_context is None else image_context.to(pipe.vae.device),
    )
    if team is not None and not team.is_leader:
        return None
    video_THWC = decode(pipe, latents_BCTHW, request.num_frames)
    if not torch.isfinite(video_THWC).all():
        raise LatentlineError(f"{request.name}: the video is not finite; try dtype float32 or less guidance")
    if isinstance(pipe.safety_checker, NoGuardrail):
        return to_bytes(video_THWC)
    video_THWC = (video_THWC * 255.0).to(torch.uint8).cpu().numpy()
    return pipe.safety_checker.to(pipe.vae.device).check_video_safety(video_THWC)


def load_decoder(model: ModelConfig, *, dtype: torch.dtype) -> Cosmos2_5_PredictBasePipeline:
    """The pipeline without transformer, text encoder and guardrail, on the CPU, for `preview`."""
    check_checkpoint(model, PIPELINE_CLASS)
    absent = dict.fromkeys(("transformer", "text_encoder", "tokenizer"))
    with quiet_about("safety_checker"):
        pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(
            model.path, revision=model.revision, safety_checker=NoGuardrail(), dtype=dtype, **absent
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def preview(
    pipe: Any,
    transformer: torch.nn.Module,
    contexts: Sequence[Tensor],
    latents_CTHW: Tensor,
    *,
    image: bool,
    num_steps: int,
    guidance: float,
    seed: int,
    conditioning_timestep: float,
    image_context: Tensor | None = None,
) -> tuple[Frames, Frames]:
    """(a sample's own video, one made from its text): uint8 [num_frames, H, W, 3] each.

    pipe: `load_decoder`'s, on the transformer's device. contexts: projected, [1, L, D], of the text and, where guidance
    is on, of the negative prompt. latents_CTHW: of the sample, normalised. image: begin with its first frame.
    image_context: [1, M, C], of models that take one. The transformer runs once for each step and context, so that
    ranks which split its weights stay in step.
    """
    latents_BCTHW = latents_CTHW.unsqueeze(0).to(pipe.vae.device)
    num_frames = FRAME_STRIDE * (latents_BCTHW.shape[2] - 1) + 1
    own_THWC = decode(pipe, latents_BCTHW, num_frames)
    condition_BCTHW = None
    if image and latents_BCTHW.shape[2] > 1:
        first = own_THWC[:1].permute(3, 0, 1, 2).unsqueeze(0) * 2 - 1
        condition_BCTHW = first.to(pipe.vae.device, pipe.vae.dtype)
    pipe.transformer = transformer
    made_BCTHW = denoise(
        pipe,
        [context.to(pipe.vae.device) for context in contexts],
        condition_BCTHW=condition_BCTHW,
        height=own_THWC.shape[1],
        width=own_THWC.shape[2],
        num_frames=num_frames,
        num_steps=num_steps,
        guidance=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        conditioning_timestep=conditioning_timestep,
        on_step=lambda: None,
        image_context_1MC=None if image_context is None else image_context.to(pipe.vae.device),
        together=False,
    )
    pipe.transformer = None
    own, made = (torch.nan_to_num(video) for video in (own_THWC, decode(pipe, made_BCTHW, num_frames)))
    return to_bytes(own), to_bytes(made)


def _load_image(request: Request) -> Image.Image:
    """The image stretched to the video's size, bilinear, as training frames are."""
    assert request.image is not None
    try:
        with Image.open(request.image) as image:
            return image.convert("RGB").resize((request.width, request.height), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError) as error:
        raise LatentlineError(f"{request.image}: cannot read this image") from error


def _load_video(request: Request) -> list[Image.Image]:
    """The video's last frames that become `num_latent_conditional_frames` latent frames."""
    assert request.video is not None
    needed = FRAME_STRIDE * (request.num_latent_conditional_frames - 1) + 1
    frames = read_frames(request.video, last=needed)
    if len(frames) < needed:
        raise LatentlineError(f"{request.video}: {len(frames)} frames, conditioning needs {needed}")
    return [Image.fromarray(frame) for frame in frames]
