"""Cosmos-Transfer2.5 as one module: the base transformer with its controlnet inside, and a faster forward of both.

    residual_k = sum over controls of weight x after_proj_k(control block k)
    x = base block i (x) + residual_k        where i = k x controlnet_block_every_n

Weights, names and results are those of diffusers' `CosmosTransformer3DModel` and `CosmosControlNetModel`; the
controlnet's names begin with `controlnet.`. What `train.dit` does for Predict is done here for both.

Image context: each cross-attention adds an attention to image tokens. Without an image those are zeros, as in
diffusers' pipeline: all tokens are then equal, the attention is their value whatever the query, and one token stands
for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CosmosControlNetModel, CosmosTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from train.attention import attend
from train.context_parallel import own_rows, own_tokens, whole
from train.dit import (
    FastCosmosBlock,
    FastCosmosTransformer,
    _computing_dtype,
    _final_norm,
    _heads,
    _rms,
    _text_attention,
)
from train.linear import linear

MASK_CHANNELS = 2
"""Of a controlnet's input, besides its slots of latents: the condition mask and the padding mask."""


@dataclass(frozen=True)
class Control:
    """One control of a forward pass.

    hint_BCTHW: latents of the control video, normalised. kind: which controlnet, None for the model's own.
    weight: of its residuals: a number, or [B, T, H, W] over the patches.
    """

    hint_BCTHW: Tensor
    kind: str | None = None
    weight: float | Tensor = 1.0


def attach_controlnet(
    transformer: CosmosTransformer3DModel, controlnet: CosmosControlNetModel
) -> ControlledTransformer:
    """Put a controlnet into a base transformer, both loaded, and give them the faster forward; return the base.

    Raises `ValueError` if they do not belong together, or for configurations the faster forward does not cover.
    """
    _check_fits(transformer, controlnet)
    transformer.__class__ = ControlledTransformer
    for block in (*transformer.transformer_blocks, *controlnet.control_blocks):
        block.__class__ = TransferBlock
    transformer.controlnet = controlnet
    return transformer


def _check_fits(transformer: CosmosTransformer3DModel, controlnet: CosmosControlNetModel) -> None:
    base, config = transformer.config, controlnet.config
    if base.controlnet_block_every_n is None:
        raise ValueError("the transformer takes no control: its controlnet_block_every_n is null")
    needed = -(-base.num_layers // base.controlnet_block_every_n)
    if config.n_controlnet_blocks < needed:
        raise ValueError(f"the controlnet has {config.n_controlnet_blocks} blocks, the transformer takes {needed}")
    shared = (
        "num_attention_heads", "attention_head_dim", "text_embed_dim", "patch_size", "rope_scale", "max_size",
        "img_context_dim_in", "img_context_dim_out",
    )  # fmt: skip
    differing = [name for name in shared if _plain(base[name]) != _plain(config[name])]
    if differing:
        raise ValueError(f"the controlnet is for another transformer: {', '.join(differing)} differ")
    for model in (base, config):
        if model.extra_pos_embed_type is not None or model.patch_size[0] != 1:
            raise ValueError("the faster forward covers Cosmos-Transfer2.5: no learnable positions, no temporal patch")


def add_controlnet(transformer: ControlledTransformer, kind: str, controlnet: CosmosControlNetModel) -> None:
    """Add the controlnet of another kind of hint, for inference; `ValueError` if it does not fit."""
    _check_fits(transformer, controlnet)
    for block in controlnet.control_blocks:
        block.__class__ = TransferBlock
    if not hasattr(transformer, "controlnets"):
        transformer.controlnets = nn.ModuleDict()
    transformer.controlnets[kind] = controlnet


class TransferBlock(FastCosmosBlock):
    """One block, of the base or of a controlnet. Shapes: as `FastCosmosBlock`; image [B, M, C]; base [B, T S, C]."""

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        embedded_BTC: Tensor,
        temb_BTC: Tensor,
        cos_ND: Tensor,
        sin_ND: Tensor,
        latent_frames: int,
        image: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Any:
        """The base's blocks return x, a controlnet's (x, residual).

        base: of a controlnet's first block: what its input is added to. Inside the block, where FSDP has its weights.
        """
        if self.before_proj is not None:
            x = self.before_proj(x) + base
        x = super().forward(x, context, embedded_BTC, temb_BTC, cos_ND, sin_ND, latent_frames, image)
        return x if self.after_proj is None else (x, self.after_proj(x))

    def cross_attention(self, y: Tensor, context: Tensor, image: Tensor | None) -> Tensor:
        """Attend to the text, and to the image's tokens where there are some."""
        attn = self.attn2
        attended = _text_attention(attn, y, context)
        if image is not None:
            values = linear(attn.v_img, image)
            if image.shape[1] > 1:
                queries = _rms(attn.q_img_norm, _heads(linear(attn.q_img, y), attn)).to(y.dtype)
                keys = _rms(attn.k_img_norm, _heads(linear(attn.k_img, image), attn)).to(y.dtype)
                values = attend(queries, keys, _heads(values, attn)).flatten(2)
            attended = attended + values
        return linear(attn.to_out[0], attended)


class ControlledTransformer(FastCosmosTransformer):
    """A base transformer with a controlnet in it; made by `attach_controlnet`, never built."""

    controls: tuple[Control, ...] = ()

    @contextmanager
    def controlled_by(self, controls: Sequence[Control]) -> Iterator[None]:
        """Use these controls in calls that state none, such as a sampling loop's."""
        before, self.controls = self.controls, tuple(controls)
        try:
            yield
        finally:
            self.controls = before

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        condition_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        fps: int | None = None,
        return_dict: bool = True,
        hint: Tensor | None = None,
        image_context: Tensor | None = None,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """Predict the velocity, as `FastCosmosTransformer` does, under control.

        hint: [B, 16, T, H, W], the model's own controlnet's at weight 1; None: the controls of `controlled_by`.
        encoder_hidden_states: [B, L, D], or [B, L, 2 D] where the projections of base and controlnet differ.
        padding_mask: [1 or B, 1, T or 1, ...], resized to the latents. image_context: [B, M, width]; None is zeros.
        """
        dtype = _computing_dtype(self)
        num_samples, _, latent_frames, height, width = hidden_states.shape
        controls = self.controls if hint is None else (Control(hint),)
        if padding_mask is None or condition_mask is None:
            raise ValueError("this model takes a condition_mask and a padding_mask")
        resized = F.interpolate(padding_mask.to(dtype), (height, width), mode="nearest")
        padding_BCTHW = resized.unsqueeze(2).expand(num_samples, 1, latent_frames, height, width)
        masks = [condition_mask.to(dtype), padding_BCTHW]
        latents_BCTHW = torch.cat([hidden_states.to(dtype), *masks], 1)
        cos_ND, sin_ND = self.rope(latents_BCTHW, fps=fps)
        num_tokens = len(cos_ND)
        cos_ND, sin_ND = own_tokens(cos_ND, 0), own_tokens(sin_ND, 0)
        image = None if image_context is None else image_context.to(dtype)
        times = timestep.flatten()

        def conditioned(model: nn.Module, x: Tensor, context: Tensor) -> tuple[Any, ...]:
            temb, embedded = model.time_embed(x, times)
            rows = (own_rows(part.view(num_samples, -1, part.shape[-1]), num_tokens) for part in (embedded, temb))
            return (context, *rows, cos_ND, sin_ND, latent_frames, _image_tokens(model, image, len(context), dtype))

        context, control_context = self._contexts(encoder_hidden_states.to(dtype))
        residuals: list[Tensor] = []
        for control in controls:
            net = self._controlnet(control.kind)
            hint_BCTHW = control.hint_BCTHW.to(dtype).expand(num_samples, -1, -1, -1, -1)
            slots = net.config.in_channels - MASK_CHANNELS - hint_BCTHW.shape[1]
            input_BCTHW = torch.cat([F.pad(hint_BCTHW, (0, 0) * 3 + (0, slots)), *masks], 1)
            x = own_tokens(net.patch_embed(input_BCTHW).flatten(1, 3), 1)
            base = own_tokens(net.patch_embed_base(latents_BCTHW).flatten(1, 3), 1)
            projection = getattr(net, "crossattn_proj", None)
            inputs = conditioned(net, x, control_context if projection is None else projection(control_context))
            weight = control.weight
            if isinstance(weight, Tensor):
                weight = own_tokens(weight.to(dtype).flatten(1).unsqueeze(-1), 1)
            for index, block in enumerate(net.control_blocks):
                x, residual = block(x, *inputs, base)
                residual = residual * weight if isinstance(weight, Tensor) or weight != 1 else residual
                if index < len(residuals):
                    residuals[index] = residuals[index] + residual
                else:
                    residuals.append(residual)

        x = own_tokens(self.patch_embed(latents_BCTHW).flatten(1, 3), 1)
        inputs = conditioned(self, x, context)
        every = self.config.controlnet_block_every_n
        for index, block in enumerate(self.transformer_blocks):
            x = block(x, *inputs)
            if residuals and index % every == 0:
                x = x + residuals[index // every]
        _, embedded_BTC, temb_BTC = inputs[:3]
        x = _final_norm(self.norm_out, x, embedded_BTC, temb_BTC)
        _, rows, columns = self.config.patch_size
        x = whole(linear(self.proj_out, x)).unflatten(2, (rows, columns, -1))
        x = x.unflatten(1, (latent_frames, height // rows, width // columns))
        output_BCTHW = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return Transformer2DModelOutput(sample=output_BCTHW) if return_dict else (output_BCTHW,)

    def _controlnet(self, kind: str | None) -> Any:
        return self.controlnets[kind] if kind in getattr(self, "controlnets", ()) else self.controlnet

    def _contexts(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(the base's context, projected; the controlnet's, raw or projected as it was given)."""
        if not self.config.use_crossattn_projection:
            return context, context
        if not isinstance(self.crossattn_proj, nn.Identity):
            return self.crossattn_proj(context), context
        if context.shape[-1] == 2 * self.config.text_embed_dim:
            first, second = context.chunk(2, -1)
            return first, second
        return context, context


def _image_tokens(model: Any, image: Tensor | None, num_samples: int, dtype: torch.dtype) -> Tensor | None:
    """Projected image tokens [B, M, C]; one token of zeros where there is no image; None if the model takes none."""
    if not model.config.img_context_dim_in:
        return None
    if image is None:
        weight = model.img_context_proj[0].weight
        image = torch.zeros(num_samples, 1, model.config.img_context_dim_in, device=weight.device, dtype=dtype)
    return model.img_context_proj(image.expand(num_samples, -1, -1))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
