"""Cosmos-Transfer2.5: all that is specific to this family when generating.

The parts are those of diffusers' `Cosmos2_5_TransferPipeline`. Base and controlnets become one transformer
(`train.transfer_dit`), so that Predict's loop, its ranks, adapters and long videos serve here too; what that computes
is the Transfer pipeline's. Differences: hints and conditioning frames are the VAE's mean, where the pipeline samples,
and a black hint is a zero latent, as in NVIDIA's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import Cosmos2_5_PredictBasePipeline, Cosmos2_5_TransferPipeline
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_transfer import DEFAULT_NEGATIVE_PROMPT
from torch import Tensor

from infer import controls, cosmos25
from infer.controlnets import add_controlnets, check_controls, compile_blocks, equal_weights
from infer.controls import fps_of, write_side_by_side
from infer.cosmos25 import check_prompt
from infer.cosmos25_sizes import FRAME_STRIDE, SIZE_MULTIPLE
from infer.loading import NoGuardrail, build_guardrail, check_checkpoint, quiet_about, require_guardrail
from infer.request import Request
from infer.team import Team
from infer.transfer_entries import parse_entry
from infer.video import Frames
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.hints import is_blank
from manifests.image_context import read_image_context
from train.cosmos_transfer25 import drop_projections, load_controlnet
from train.transfer_dit import Control, attach_controlnet

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "add_controlnets",
    "check_controls",
    "check_prompt",
    "check_request",
    "encode_prompt",
    "fps_of",
    "generate_frames",
    "latent_frames_of",
    "load_decoder",
    "load_pipeline",
    "num_tokens",
    "parse_entry",
    "preview",
    "release_text",
    "require_guardrail",
    "write_side_by_side",
]

PIPELINE_CLASS = "Cosmos2_5_TransferPipeline"
_SHARED = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler", "safety_checker")


def check_request(request: Request) -> None:
    """Raise UsageError unless the model can make this video."""
    if not request.controls:
        raise UsageError(
            f"{request.name}: Cosmos-Transfer2.5 needs hints; give a .json file whose entries have video_path and one "
            "of edge, vis, depth and seg"
        )
    is_long = request.chunk_frames is not None and request.num_frames > request.chunk_frames
    frames = request.num_frames if is_long else _whole(request.num_frames)
    cosmos25.check_request(replace(request, image=None, video=None, num_frames=frames))
    controls.check_files(request)


def load_pipeline(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    guardrail: bool,
    accelerate_vae: Callable[[Any], None] = lambda vae: None,
) -> Cosmos2_5_PredictBasePipeline:
    """The pipeline on `device`, all parts in `dtype`: Predict's class around Transfer's parts, the controlnet inside.

    On CUDA the blocks are compiled, once for each size of video. The rest, and errors: as `infer.cosmos25`.
    """
    if guardrail:
        require_guardrail()
    check_checkpoint(model, PIPELINE_CLASS)
    checker = build_guardrail() if guardrail else NoGuardrail()
    controlnet = load_controlnet(model, dtype)
    with quiet_about("safety_checker"):
        loaded = Cosmos2_5_TransferPipeline.from_pretrained(
            model.path, revision=model.revision, controlnet=controlnet, safety_checker=checker, dtype=dtype
        )
        pipe = Cosmos2_5_PredictBasePipeline(**{name: loaded.components[name] for name in _SHARED})
    pipe.set_progress_bar_config(disable=True)
    try:
        transformer = attach_controlnet(pipe.transformer, controlnet)
    except ValueError as error:
        raise UsageError(f"model.controlnet: {error}") from error
    compile_blocks([*transformer.transformer_blocks, *controlnet.control_blocks], device)
    pipe.to(device)
    accelerate_vae(pipe.vae)
    return pipe


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """The prompt's context, [1, 512, D] on the CPU, or [1, 512, 2 D] where base and controlnet project differently."""
    embeds_BLD = cosmos25.embed_prompt(pipe, prompt)
    first, second = pipe.transformer, pipe.transformer.controlnet
    if not first.config.use_crossattn_projection:
        return embeds_BLD.cpu()
    base_BLD = first.crossattn_proj(embeds_BLD)
    if equal_weights(first.crossattn_proj, second.crossattn_proj):
        return base_BLD.cpu()
    return torch.cat([base_BLD, second.crossattn_proj(embeds_BLD)], -1).cpu()


def release_text(pipe: Any) -> None:
    """Free what only `encode_prompt` needs: the text encoder and all text projections."""
    drop_projections(pipe.transformer)
    cosmos25.release_text(pipe)


def latent_frames_of(num_frames: int) -> int:
    """Latent frames that `num_frames` become once they are 4k+1."""
    return cosmos25.latent_frames_of(_whole(num_frames))


def num_tokens(request: Request) -> int:
    """Tokens of the transformer for one window of the request's video."""
    frames = min(request.num_frames, request.chunk_frames or request.num_frames)
    return cosmos25.num_tokens(replace(request, num_frames=_whole(frames)))


@torch.no_grad()
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
) -> Frames | None:
    """One piece of a video under its controls; the arguments are those of `infer.cosmos25.generate_frames`.

    The piece begins at `request.first_frame` of the hints. Lengths that are not 4k+1 are made longer, to be cut.
    """
    num_frames = _whole(request.num_frames)
    shape = (latent_frames_of(num_frames), request.height // SIZE_MULTIPLE, request.width // SIZE_MULTIPLE)
    span = (request.first_frame, num_frames)
    weights = controls.patch_weights(
        [control.weight for control in request.controls],
        [controls.mask_frames(request, control, *span) for control in request.controls],
        shape,
        FRAME_STRIDE,
    )
    steering = []
    for control, weight in zip(request.controls, weights, strict=True):
        latents = _hint_latents(pipe, controls.hint_frames(request, control, *span))
        placed = weight if isinstance(weight, float) else torch.from_numpy(weight).unsqueeze(0).to(latents.device)
        steering.append(Control(latents, control.kind, placed))
    with pipe.transformer.controlled_by(steering):
        return cosmos25.generate_frames(
            pipe,
            replace(request, image=None, video=None, num_frames=num_frames),
            context,
            negative_context,
            conditioning_timestep=conditioning_timestep,
            on_step=on_step,
            on_sigma=on_sigma,
            previous_THWC=previous_THWC,
            team=team,
            image_context=_image_context(request),
        )


def _image_context(request: Request) -> Tensor | None:
    return None if request.image_context is None else read_image_context(request.image_context).unsqueeze(0)


def _hint_latents(pipe: Any, frames_THWC: Frames) -> Tensor:
    """The VAE's mean of a hint, normalised, [1, C, T, H, W] float32; zeros for one that is black throughout."""
    vae = pipe.vae
    pixels = torch.from_numpy(frames_THWC).to(vae.device).permute(3, 0, 1, 2).unsqueeze(0)
    latents_BCTHW = vae.encode((pixels.float() / 127.5 - 1.0).to(vae.dtype)).latent_dist.mode().float()
    if is_blank(frames_THWC):
        return torch.zeros_like(latents_BCTHW)
    mean, std = (torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1) for values in _scale(vae))
    return (latents_BCTHW - mean) / std


def _scale(vae: Any) -> tuple[list[float], list[float]]:
    return vae.config.latents_mean, vae.config.latents_std


def _whole(num_frames: int) -> int:
    """The next number that is 4k+1."""
    return -(-(num_frames - 1) // FRAME_STRIDE) * FRAME_STRIDE + 1


def load_decoder(model: ModelConfig, *, dtype: torch.dtype) -> Cosmos2_5_PredictBasePipeline:
    """The pipeline without transformer, text encoder and guardrail, on the CPU, for `preview`."""
    check_checkpoint(model, PIPELINE_CLASS)
    absent = dict.fromkeys(("transformer", "text_encoder", "tokenizer", "controlnet"))
    checker = NoGuardrail()
    with quiet_about("safety_checker"):
        loaded = Cosmos2_5_TransferPipeline.from_pretrained(
            model.path, revision=model.revision, safety_checker=checker, dtype=dtype, **absent
        )
        pipe = Cosmos2_5_PredictBasePipeline(**{name: loaded.components[name] for name in _SHARED})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def preview(
    pipe: Any,
    transformer: Any,
    contexts: Sequence[Tensor],
    latents_CTHW: Tensor,
    *,
    hint: Tensor,
    padding: Sequence[int] | None,
    image_context: Tensor | None = None,
    **settings: Any,
) -> tuple[Frames, Frames]:
    """(a sample's own video, one made from its text and hint); settings: as `infer.cosmos25.preview`.

    hint: of the sample, normalised [C, T, H, W]. padding: not masked here; the made video fills its frame.
    image_context: of the sample, [M, C].
    """
    with transformer.controlled_by([Control(hint.unsqueeze(0).to(pipe.vae.device))]):
        given = None if image_context is None else image_context.unsqueeze(0)
        return cosmos25.preview(pipe, transformer, contexts, latents_CTHW, image_context=given, **settings)
