"""Cosmos-Transfer2.5 in training: a frozen base, and a controlnet that learns to follow hints.

Objective, noise, conditioning and latents are Predict's (`train.cosmos25`). What is its own: a hint beside each
sample's latents, encoded by the same VAE, a mask of what is padding, and two text projections, of the base and the
controlnet. The image context is zeros, as in diffusers' pipeline, or each sample's own; dropped text leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import CosmosControlNetModel, CosmosTransformer3DModel

from manifests.config import ModelConfig
from manifests.errors import StaleCacheError, UsageError
from manifests.fingerprint import component_folder, weights_digest
from manifests.hints import write_kinds
from manifests.keys import digest
from manifests.padding import latent_mask
from manifests.snapshot import Snapshot
from train import cosmos25
from train.cosmos25 import (
    DEFAULT_TARGETS,
    ORIGINAL_NAMES,
    TOKEN_LINEARS,
    Draw,
    attention_shape,
    check_context_parallel,
    check_objective,
    draw,
    hidden_size,
    is_projected,
    load_stock,
    loss,
    normalise,
    num_tokens,
    sigma_at,
)
from train.dit import block_inputs as base_block_inputs
from train.dit import flops_per_sample as base_flops
from train.flops import attention_flops, linear_flops
from train.transfer_dit import ControlledTransformer, attach_controlnet

__all__ = [
    "CONTROL",
    "DEFAULT_TARGETS",
    "ORIGINAL_NAMES",
    "TOKEN_LINEARS",
    "USES_HINTS",
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
    "export_controlnet",
    "flops_per_sample",
    "hidden_size",
    "is_projected",
    "load_transformer",
    "loss",
    "normalise",
    "normalise_hint",
    "num_tokens",
    "sigma_at",
    "stock",
]

USES_HINTS = True

CONTROL = ("controlnet.control_blocks.*", "controlnet.patch_embed.*")
"""What `train.method = "control"` trains: the control blocks and the embedder of hints. The rest of the controlnet
(its copies of the base's embedders and of the text projection) stays."""

_PREFIX = "controlnet."
_STRIDE = 8


def load_transformer(
    model: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", *, projected: bool = True
) -> ControlledTransformer:
    """Load the frozen base and its controlnet with every weight accounted for, as one module.

    projected: contexts have passed both text projections already, so these are dropped.
    Raises `UsageError` if tensors are not exactly the models', or the two do not belong together.
    """
    transformer = load_stock(CosmosTransformer3DModel, model, "transformer", dtype)
    controlnet = load_controlnet(model, dtype)
    return _joined(model, transformer, controlnet, projected).to(device)


def load_controlnet(model: ModelConfig, dtype: torch.dtype) -> CosmosControlNetModel:
    """Load the controlnet of `model.controlnet`, or of the checkpoint itself, strictly."""
    return load_stock(CosmosControlNetModel, model, "controlnet", dtype)


def empty_transformer(model: ModelConfig, *, projected: bool = True) -> ControlledTransformer:
    """Build both models on the meta device: shapes and names, no weights, no time."""
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel.from_config(cosmos25._config(model, "transformer"))
        controlnet = CosmosControlNetModel.from_config(cosmos25._config(model, "controlnet"))
    return _joined(model, transformer, controlnet, projected)


def _joined(model: ModelConfig, transformer: Any, controlnet: Any, projected: bool) -> ControlledTransformer:
    try:
        joined = attach_controlnet(transformer, controlnet)
    except ValueError as error:
        raise UsageError(f"model.path {model.path!r}: {error}") from error
    if projected:
        drop_projections(joined)
    return joined.requires_grad_(False)


def drop_projections(transformer: ControlledTransformer) -> None:
    """Leave out the text projections of the base and of all controlnets: contexts have passed them."""
    nets = [transformer.controlnet, *getattr(transformer, "controlnets", {}).values()]
    for part in (transformer, *nets):
        if isinstance(getattr(part, "crossattn_proj", None), torch.nn.Module):
            part.crossattn_proj = torch.nn.Identity()


def stock(transformer: ControlledTransformer) -> CosmosTransformer3DModel:
    """The base's weights in diffusers' own class, without the controlnet."""
    with torch.device("meta"):
        plain = CosmosTransformer3DModel.from_config(transformer.config)
    if not next(transformer.parameters()).is_meta:
        state = {name: tensor for name, tensor in transformer.state_dict().items() if not name.startswith(_PREFIX)}
        plain.load_state_dict(state, strict=True, assign=True)
    return plain


def blocks(transformer: ControlledTransformer) -> list[torch.nn.Module]:
    """The modules that are sharded, compiled and recomputed as one unit each: the base's, then the controlnet's."""
    return [*transformer.transformer_blocks, *transformer.controlnet.control_blocks]


def block_inputs(
    transformer: ControlledTransformer,
    shape_BCTHW: Sequence[int],
    context_length: int,
    device: torch.device,
    *,
    image_context: bool = False,
) -> tuple[Any, ...]:
    """As `train.dit.block_inputs`, with projected tokens of an image context if samples have one."""
    inputs = base_block_inputs(transformer, shape_BCTHW, context_length, device)
    if not image_context:
        return inputs
    config = transformer.config
    shape = (shape_BCTHW[0], config.img_context_num_tokens, config.img_context_dim_out)
    return (*inputs, torch.randn(shape, device=device, dtype=inputs[0].dtype))


def base_digest(model: ModelConfig) -> str:
    """Return what tells this base and this controlnet from others."""
    return digest(
        [cosmos25.base_digest(model), weights_digest(component_folder(model, "controlnet"), "control_blocks.0.")]
    )


def check_snapshot(snapshot: Snapshot, model: ModelConfig) -> None:
    """Refuse a snapshot that other weights made, the controlnet's projection and the hints' VAE included."""
    cosmos25.check_snapshot(snapshot, model)
    if is_projected(snapshot):
        found = snapshot.fingerprints["context"].get("control_projection")
        wanted = weights_digest(component_folder(model, "controlnet"), "crossattn_proj")
        if found != wanted:
            raise StaleCacheError(
                f"snapshot {snapshot.hash[:12]}: its contexts were made for another controlnet's text projection "
                f"({(found or 'none')[:12]}, this one has {wanted[:12]}); run `latentline encode` with this model"
            )
    if "hint" not in snapshot.fingerprints:
        raise UsageError(
            f"snapshot {snapshot.hash[:12]} has no hints; set encode.hints.kinds and run `latentline encode`"
        )
    if snapshot.fingerprints["hint"]["vae"] != snapshot.fingerprints["latents"]["vae"]:
        raise StaleCacheError(
            f"snapshot {snapshot.hash[:12]}: its hints and its latents were made with different VAEs; run "
            "`latentline encode` with this model"
        )


def normalise_hint(hint: torch.Tensor, parts: Mapping[str, Any]) -> torch.Tensor:
    """Scale a hint's latents [C, T, H, W] as latents are; that of a black hint is exactly zero."""
    mean = torch.tensor(parts["latents_mean"], dtype=torch.float32).view(-1, 1, 1, 1).to(hint.dtype)
    if bool((hint == mean).all()):
        return torch.zeros_like(hint, dtype=torch.float32)
    return normalise(hint, parts)


def example(
    latents: torch.Tensor,
    context: torch.Tensor,
    drawn: Draw,
    *,
    hint: torch.Tensor,
    padding: Sequence[int] | None,
    image_context: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Bring together what `loss` consumes of one sample; the loader stacks these into a batch.

    latents, hint: [C, T, H, W] float32, normalised. context: [L, D] or [L, 2 D]. padding: pixels that are not the
    video's (top, bottom, left, right), None without. image_context: [M, W], None for zeros.
    """
    height, width = latents.shape[2:]
    mask = torch.from_numpy(latent_mask(padding, height, width, _STRIDE)).unsqueeze(0)
    given = {} if image_context is None else {"image_context": image_context}
    return cosmos25.example(latents, context, drawn) | {"hint": hint, "padding_mask": mask, **given}


def export_controlnet(
    model: ModelConfig, trained: Path, folder: Path, kinds: Sequence[str], dtype: torch.dtype
) -> Path:
    """Write the controlnet with trained weights as a folder that stock diffusers loads; return it.

    trained: a run's `trained_weights.safetensors`. kinds: of the hints it was trained on, written beside it. dtype: of
    what is written. Raises `UsageError` for a temporal adapter in the control branch, which a stock controlnet has not.
    """
    tensors = safetensors.torch.load_file(trained)
    controlnet = load_controlnet(model, torch.float32)
    places = dict(controlnet.named_parameters())
    mine = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    strangers = sorted(mine.keys() - places.keys())
    if strangers:
        raise UsageError(f"{trained}: {strangers[0]} has no place in a stock controlnet; `latentline infer` reads it")
    with torch.no_grad():
        for name, tensor in mine.items():
            places[name].copy_(tensor)
    for parameter in controlnet.parameters():
        parameter.data = parameter.data.to(dtype)
    controlnet.save_pretrained(folder)
    write_kinds(folder, kinds)
    return folder


def flops_per_sample(transformer: ControlledTransformer, shape: Sequence[int], context_length: int) -> float:
    """Model FLOP of one training step of one sample, as `train.flops` counts them; projections of control left out."""
    config = transformer.config
    tokens, hidden = num_tokens(transformer, tuple(shape)), hidden_size(transformer)
    trained = transformer.controlnet.control_blocks[-1].ff.net[2].weight.requires_grad
    weights = 6 * hidden**2 + 2 * hidden * int(config.mlp_ratio * hidden)
    block = linear_flops(tokens, weights, trained=trained)
    block += linear_flops(context_length, 2 * hidden * config.text_embed_dim, trained=trained)
    block += attention_flops(tokens, tokens, hidden) + attention_flops(tokens, context_length, hidden)
    control = transformer.controlnet.config.n_controlnet_blocks * block
    return base_flops(transformer, shape, context_length) + control
