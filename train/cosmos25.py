"""Cosmos-Predict2.5 in training: the transformer, its latents' scale, and its objective.

Everything that is specific to this model family and to training is here: which weights are loaded, which
caches fit them, how latents are normalised, and the rectified-flow loss. What is drawn for each sample is beside it, in
`train.cosmos25_draw`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import CosmosTransformer3DModel

from manifests.config import ModelConfig
from manifests.errors import LatentlineError, StaleCacheError, UsageError
from manifests.fingerprint import component_config, component_folder, weights_digest
from manifests.snapshot import Snapshot
from train.config import ObjectiveConfig
from train.context_parallel import check_divides
from train.cosmos25_draw import Draw, draw, sigma_at
from train.cosmos25_names import ORIGINAL_NAMES
from train.dit import accelerate, block_inputs, flops_per_sample

__all__ = [
    "DEFAULT_TARGETS",
    "ORIGINAL_NAMES",
    "TOKEN_LINEARS",
    "Draw",
    "attention_shape",
    "base_digest",
    "block_inputs",
    "blocks",
    "check_context_parallel",
    "check_objective",
    "check_snapshot",
    "draw",
    "empty_transformer",
    "example",
    "flops_per_sample",
    "hidden_size",
    "is_projected",
    "load_transformer",
    "loss",
    "normalise",
    "num_tokens",
    "sigma_at",
    "stock",
]

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""The linear layers diffusers' recipe adapts: self- and cross-attention, and the MLP."""

TOKEN_LINEARS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj",
    "ff.net.2",
)  # fmt: skip
"""The linear layers of a block that work on every token, nearly all of its weights; others see text or time."""

_PROJECTION = "crossattn_proj"


def load_transformer(
    model: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", *, projected: bool = True
) -> CosmosTransformer3DModel:
    """Load the frozen transformer with every weight accounted for.

    projected: contexts have passed the text projection already, so its 102.8M weights are dropped.
    Raises `UsageError` if the checkpoint's tensors are not exactly the model's.
    """
    transformer = load_stock(CosmosTransformer3DModel, model, "transformer", dtype)
    if projected:
        _drop_projection(transformer)
    return _accelerated(model, transformer.requires_grad_(False).to(device))


def load_stock(kind: type, model: ModelConfig, component: str, dtype: torch.dtype) -> Any:
    """Load a component as diffusers' class, with every weight accounted for; `UsageError` if one is not."""
    component_config(model, component, kind.__name__)
    folder = component_folder(model, component)
    try:
        loaded, info = kind.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            first = next(iter(info[problem]))
            raise UsageError(
                f"{folder}: {component} has {len(info[problem])} {problem.replace('_', ' ')} "
                f"(first: {first}); its config.json and weights do not belong together"
            )
    return loaded


def empty_transformer(model: ModelConfig, *, projected: bool = True) -> CosmosTransformer3DModel:
    """Build the transformer on the meta device: shapes and names, no weights, no time."""
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel.from_config(_config(model, "transformer"))
    if projected:
        _drop_projection(transformer)
    return _accelerated(model, transformer.requires_grad_(False))


def _accelerated(model: ModelConfig, transformer: CosmosTransformer3DModel) -> CosmosTransformer3DModel:
    try:
        return accelerate(transformer)
    except ValueError as error:
        raise UsageError(f"model.path {model.path!r}: {error}; is model.family {model.family!r} its own?") from error


def stock(transformer: CosmosTransformer3DModel) -> CosmosTransformer3DModel:
    """The same weights in diffusers' own class, which is the one to save: config.json names the class."""
    with torch.device("meta"):
        plain = CosmosTransformer3DModel.from_config(transformer.config)
    if not next(transformer.parameters()).is_meta:
        plain.load_state_dict(transformer.state_dict(), strict=True, assign=True)
    return plain


def blocks(transformer: CosmosTransformer3DModel) -> list[torch.nn.Module]:
    """The modules that are sharded, compiled and recomputed as one unit each, in order."""
    return list(transformer.transformer_blocks)


def _drop_projection(transformer: CosmosTransformer3DModel) -> None:
    if hasattr(transformer, _PROJECTION):
        transformer.crossattn_proj = torch.nn.Identity()


def base_digest(model: ModelConfig) -> str:
    """Return what tells this base from another: the digest of its first block's weights."""
    return weights_digest(component_folder(model, "transformer"), "transformer_blocks.0.")


def is_projected(snapshot: Snapshot) -> bool:
    """Say whether the snapshot's contexts have passed the text projection."""
    return snapshot.fingerprints["context"]["projection"] is not None


def check_snapshot(snapshot: Snapshot, model: ModelConfig) -> None:
    """Refuse a snapshot that another model's weights made; `StaleCacheError` names the part that differs."""
    vae = _config(model, "vae")
    expected: list[tuple[str, str, Any]] = [
        ("latents", "vae", weights_digest(component_folder(model, "vae"))),
        ("latents", "latents_mean", list(vae["latents_mean"])),
        ("latents", "latents_std", list(vae["latents_std"])),
    ]
    if is_projected(snapshot):
        if not _config(model, "transformer").get("use_crossattn_projection"):
            raise StaleCacheError(
                f"snapshot {snapshot.hash[:12]}: its contexts are projected but model.path {model.path!r} has no "
                "text projection; run `latentline encode` with this model"
            )
        digest = weights_digest(component_folder(model, "transformer"), _PROJECTION)
        expected.append(("context", "projection", digest))
    for kind, part, value in expected:
        found = snapshot.fingerprints[kind][part]
        if (list(found) if isinstance(value, list) else found) != value:
            raise StaleCacheError(
                f"snapshot {snapshot.hash[:12]}: its {kind} were made with {part} {_short(found)}, model.path "
                f"{model.path!r} has {_short(value)}; run `latentline encode` with this model"
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else f"{str(list(value))[:24]}..."


def _config(model: ModelConfig, component: str) -> dict[str, Any]:
    return json.loads((component_folder(model, component) / "config.json").read_text())


def check_objective(objective: ObjectiveConfig, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse an objective under which a sample could have no frame left to learn from.

    shapes: (C, T, H, W) of every bucket.
    """
    most = max(frames for frames, probability in objective.conditioning.items() if probability > 0)
    for shape in shapes:
        if shape[1] <= most:
            raise UsageError(
                f"train.objective.conditioning: {most} clean latent frames leave nothing to learn in samples of "
                f"{shape[1]} latent frames; allow at most {shape[1] - 1}"
            )


def check_context_parallel(ranks: int, model: ModelConfig, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse a number of ranks that cannot share a sample's tokens evenly. shapes: (C, T, H, W) of every bucket."""
    patch_size = _config(model, "transformer")["patch_size"]
    check_divides(ranks, {shape: _num_patches(patch_size, shape) for shape in shapes})


def normalise(latents: torch.Tensor, parts: Mapping[str, Any]) -> torch.Tensor:
    """Scale posterior means to the model's unit: (mu - mean_c) / std_c, in float32.

    latents: [C, T, H, W], unnormalised, any float dtype. parts: the latents' fingerprint parts. Raises
    `LatentlineError` for a value that is not finite.
    """
    mean = torch.tensor(parts["latents_mean"], dtype=torch.float32).view(-1, 1, 1, 1)
    std = torch.tensor(parts["latents_std"], dtype=torch.float32).view(-1, 1, 1, 1)
    scaled = (latents.float() - mean) / std
    if not torch.isfinite(scaled).all():
        raise LatentlineError("latents hold values that are not finite; encode this sample again")
    return scaled


def example(latents: torch.Tensor, context: torch.Tensor, drawn: Draw) -> dict[str, torch.Tensor]:
    """Bring together what `loss` consumes of one sample; the loader stacks these into a batch.

    latents: [C, T, H, W] float32, normalised. context: [L, D].
    """
    return {
        "latents": latents,
        "context": context,
        "noise": drawn.noise,
        "sigma": torch.tensor(drawn.sigma, dtype=torch.float32),
        "num_conditioning": torch.tensor(drawn.num_conditioning),
    }


def loss(transformer: torch.nn.Module, batch: Mapping[str, torch.Tensor], objective: ObjectiveConfig) -> torch.Tensor:
    """Return the rectified-flow loss of each sample: [B], float32.

    batch: `example`s stacked: latents and noise [B, C, T, H, W], context [B, L, D], sigma and
    num_conditioning [B]. With x_t = sigma eps + (1 - sigma) x_0 the target is eps - x_0. Conditioning frames
    enter clean, at the timestep `objective.conditioning_timestep` (sigma if that is negative); their error
    is zero but they stay in the mean, which is over all of a sample's latents. `hint`, `image_context` and
    `padding_mask` [B, 1, H, W] are handed on where a batch has them. Frames, masks and timesteps are passed as in
    diffusers' `Cosmos2_5_PredictBasePipeline.__call__`.
    """
    latents_BCTHW, noise_BCTHW = batch["latents"], batch["noise"]
    num_samples, _, latent_frames, height, width = latents_BCTHW.shape
    frame_T = torch.arange(latent_frames, device=latents_BCTHW.device)
    clean_B1T11 = (frame_T < batch["num_conditioning"].view(-1, 1)).view(num_samples, 1, latent_frames, 1, 1)
    sigma_B1111 = batch["sigma"].view(-1, 1, 1, 1, 1)
    target_BCTHW = noise_BCTHW - latents_BCTHW
    noised_BCTHW = sigma_B1111 * noise_BCTHW + (1 - sigma_B1111) * latents_BCTHW
    if objective.conditioning_timestep >= 0:
        timestep_B1T11 = torch.where(clean_B1T11, objective.conditioning_timestep, sigma_B1111)
    else:
        timestep_B1T11 = sigma_B1111.expand(num_samples, 1, latent_frames, 1, 1)
    prediction_BCTHW = transformer(
        hidden_states=torch.where(clean_B1T11, latents_BCTHW, noised_BCTHW),
        timestep=timestep_B1T11,
        encoder_hidden_states=batch["context"],
        condition_mask=clean_B1T11.float().expand(num_samples, 1, latent_frames, height, width),
        padding_mask=batch.get("padding_mask", latents_BCTHW.new_zeros(1, 1, height, width)),
        return_dict=False,
        **{name: batch[name] for name in ("hint", "image_context") if name in batch},
    )[0]
    error_BCTHW = torch.where(clean_B1T11, 0.0, prediction_BCTHW.float() - target_BCTHW)
    return error_BCTHW.square().flatten(1).mean(1)


def num_tokens(transformer: CosmosTransformer3DModel, shape: tuple[int, ...]) -> int:
    """Return the tokens the transformer attends over for latents of shape (C, T, H, W)."""
    return _num_patches(transformer.config.patch_size, shape)


def _num_patches(patch_size: Sequence[int], shape: tuple[int, ...]) -> int:
    frames, rows, columns = patch_size
    return (shape[1] // frames) * (shape[2] // rows) * (shape[3] // columns)


def attention_shape(transformer: CosmosTransformer3DModel, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return [1, tokens, heads, head width] of self-attention for latents of shape (C, T, H, W)."""
    config = transformer.config
    return 1, num_tokens(transformer, shape), config.num_attention_heads, config.attention_head_dim


def hidden_size(transformer: CosmosTransformer3DModel) -> int:
    return transformer.config.num_attention_heads * transformer.config.attention_head_dim
