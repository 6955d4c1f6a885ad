"""A faster forward of diffusers' `CosmosTransformer3DModel`: same weights, names and results.

What differs from the stock forward:
- AdaLN modulation is computed once a latent frame and broadcast, not once a token (T rows instead of T x H x W).
- Self-attention's q, k and v come from one GEMM, and LoRA's small products are stacked (`train.linear`).
- Norm, modulation, gate, RoPE and GELU are written so that `torch.compile`, block by block, fuses them.

`accelerate` changes a loaded model in place. The class stays a `CosmosTransformer3DModel`: `save_pretrained`, peft
injection, LoRA files and diffusers' pipelines see nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_cosmos import CosmosTransformerBlock
from torch import Tensor, nn

from train.attention import attend, attend_to_few
from train.context_parallel import all_tokens, own_rows, own_tokens, whole
from train.flops import attention_flops, linear_flops
from train.gelu import gelu
from train.linear import linear, stacked_linear
from train.normalise import normalise
from train.temporal import ADAPTER


def accelerate(transformer: CosmosTransformer3DModel) -> CosmosTransformer3DModel:
    """Give a transformer, already loaded, the faster forward; return it.

    Raises `ValueError` for configurations the faster forward does not cover: learnable positions, image context, a
    temporal patch, or grouped heads.
    """
    config = transformer.config
    if config.extra_pos_embed_type is not None or config.img_context_dim_in or config.patch_size[0] != 1:
        raise ValueError("the faster forward covers Cosmos-Predict2.5: no learnable positions, no image context")
    transformer.__class__ = FastCosmosTransformer
    for block in transformer.transformer_blocks:
        block.__class__ = FastCosmosBlock
    return transformer


class FastCosmosBlock(CosmosTransformerBlock):
    """One block. Shapes: x [B, T S, C] with S tokens a latent frame; context [B, L, D].

    Of a batch that differs in its contexts alone the first block may be given one sample: it computes what comes before
    the text once.
    """

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
    ) -> Any:
        y, gate = _modulated(self.norm1, x, embedded_BTC, temb_BTC)
        x = _gated(x, gate, _self_attention(self.attn1, y, cos_ND, sin_ND))
        x = x.expand(context.shape[0], -1, -1)
        y, gate = _modulated(self.norm2, x, embedded_BTC, temb_BTC)
        x = _gated(x, gate, self.cross_attention(y, context, image))
        y, gate = _modulated(self.norm3, x, embedded_BTC, temb_BTC)
        up, down = self.ff.net[0].proj, self.ff.net[2]
        x = _gated(x, gate, linear(down, gelu(linear(up, y))))
        return getattr(self, ADAPTER)(x, latent_frames) if hasattr(self, ADAPTER) else x

    def cross_attention(self, y: Tensor, context: Tensor, image: Tensor | None) -> Tensor:
        """Attend to the text. image: for a subclass whose model has image tokens; None here."""
        return linear(self.attn2.to_out[0], _text_attention(self.attn2, y, context))


class FastCosmosTransformer(CosmosTransformer3DModel):
    """The transformer with the faster forward; made by `accelerate`, never built."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        condition_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        fps: int | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """Predict the velocity.

        hidden_states: [B, 16, T, H, W] latents. timestep: [B, 1, T, 1, 1] or [B], on the sigma scale.
        encoder_hidden_states: [B, L, D]; where all else has B = 1, several contexts for the same latents, in less time
        than that batch would take. condition_mask: [B, 1, T, H, W]. padding_mask: [1, 1, *, *], resized to
        the latents. fps: as the stock forward takes it; None for Cosmos-2.5.
        Inputs are cast to the weights' dtype, or autocast's; the output [B, 16, T, H, W] has it.
        """
        dtype = _computing_dtype(self)
        num_samples, _, latent_frames, height, width = hidden_states.shape
        parts = [hidden_states.to(dtype)]
        if condition_mask is not None:
            parts.append(condition_mask.to(dtype))
        if self.config.concat_padding_mask:
            if padding_mask is None:
                raise ValueError("this model takes a padding_mask")
            resized = F.interpolate(padding_mask.to(dtype), (height, width), mode="nearest-exact")
            parts.append(resized.unsqueeze(2).expand(num_samples, 1, latent_frames, height, width))
        latents_BCTHW = torch.cat(parts, 1)
        cos_ND, sin_ND = self.rope(latents_BCTHW, fps=fps)
        x = self.patch_embed(latents_BCTHW).flatten(1, 3)
        num_tokens = x.shape[1]
        x, cos_ND, sin_ND = own_tokens(x, 1), own_tokens(cos_ND, 0), own_tokens(sin_ND, 0)

        num_times = timestep.numel() // num_samples
        temb, embedded = self.time_embed(x, timestep.flatten())
        temb_BTC, embedded_BTC = (
            own_rows(rows.view(num_samples, num_times, -1), num_tokens) for rows in (temb, embedded)
        )
        context = encoder_hidden_states.to(dtype)
        if self.config.use_crossattn_projection:
            context = self.crossattn_proj(context)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(
                    block, x, context, embedded_BTC, temb_BTC, cos_ND, sin_ND, latent_frames
                )
            else:
                x = block(x, context, embedded_BTC, temb_BTC, cos_ND, sin_ND, latent_frames)
        x = _final_norm(self.norm_out, x, embedded_BTC, temb_BTC)
        _, rows, columns = self.config.patch_size
        x = whole(linear(self.proj_out, x)).unflatten(2, (rows, columns, -1))
        x = x.unflatten(1, (latent_frames, height // rows, width // columns))
        # [B, T, H, W, rows, columns, C]: the stock order of patch pixels and channels.
        output_BCTHW = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return Transformer2DModelOutput(sample=output_BCTHW) if return_dict else (output_BCTHW,)


def block_inputs(
    transformer: CosmosTransformer3DModel, shape_BCTHW: Sequence[int], context_length: int, device: torch.device
) -> tuple[Any, ...]:
    """Random inputs of one block, as the transformer would give it for latents of this shape.

    Made on `device`, wherever the transformer is; x requires a gradient. Where ranks share samples, this rank's part.
    """
    num_samples, _, latent_frames, height, width = shape_BCTHW
    config = transformer.config
    hidden = config.num_attention_heads * config.attention_head_dim
    _, rows, columns = config.patch_size
    dtype = _computing_dtype(transformer)
    tokens = latent_frames * (height // rows) * (width // columns)
    cos_ND, sin_ND = transformer.rope(torch.empty(1, 1, latent_frames, height, width, device=device), fps=None)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return (
        own_tokens(random(num_samples, tokens, hidden), 1).requires_grad_(),
        random(num_samples, context_length, config.text_embed_dim),
        own_rows(random(num_samples, latent_frames, hidden), tokens),
        own_rows(random(num_samples, latent_frames, 3 * hidden), tokens),
        own_tokens(cos_ND, 0),
        own_tokens(sin_ND, 0),
        latent_frames,
    )


def _computing_dtype(transformer: CosmosTransformer3DModel) -> torch.dtype:
    """Weights that train are float32 masters: under autocast they compute in its dtype, under FSDP in theirs."""
    weight = transformer.patch_embed.proj.weight
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def flops_per_sample(transformer: CosmosTransformer3DModel, shape_CTHW: Sequence[int], context_length: int) -> float:
    """Model FLOP of one training step of one sample, as `train.flops` counts them.

    Whether the base's linear layers have weight gradients is told by the last block's MLP.
    """
    _, latent_frames, height, width = shape_CTHW
    config = transformer.config
    _, rows, columns = config.patch_size
    tokens = latent_frames * (height // rows) * (width // columns)
    hidden = config.num_attention_heads * config.attention_head_dim
    mlp = int(config.mlp_ratio * hidden)
    trained = transformer.transformer_blocks[-1].ff.net[2].weight.requires_grad
    block = linear_flops(tokens, 4 * hidden**2 + 2 * hidden**2 + 2 * hidden * mlp, trained=trained)
    block += linear_flops(context_length, 2 * hidden * config.text_embed_dim, trained=trained)
    block += attention_flops(tokens, tokens, hidden) + attention_flops(tokens, context_length, hidden)
    return config.num_layers * block


def _per_frame(x: Tensor, num_times: int) -> Tensor:
    """View [B, N, C] as [B, T, N / T, C], tokens being in order of latent frame."""
    return x.unflatten(1, (num_times, -1))


def _scaled(eps: float, x: Tensor, shift_BTC: Tensor, scale_BTC: Tensor) -> Tensor:
    normed = normalise(x, eps)
    shift, scale = shift_BTC.float().unsqueeze(2), scale_BTC.float().unsqueeze(2)
    return (_per_frame(normed, shift_BTC.shape[1]) * (1 + scale) + shift).to(x.dtype).flatten(1, 2)


# For the norm after the blocks: these are compiled whole.
_compiled_scaled = torch.compile(_scaled, fullgraph=True, dynamic=False)


def _modulated(norm: nn.Module, x: Tensor, embedded_BTC: Tensor, temb_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """AdaLN-Zero: the normalised, shifted and scaled x, and the gate [B, T, C]."""
    modulation = norm.linear_2(norm.linear_1(F.silu(embedded_BTC))) + temb_BTC
    shift, scale, gate = modulation.chunk(3, -1)
    return _scaled(norm.norm.eps, x, shift, scale), gate


def _final_norm(norm: nn.Module, x: Tensor, embedded_BTC: Tensor, temb_BTC: Tensor) -> Tensor:
    modulation = norm.linear_2(norm.linear_1(F.silu(embedded_BTC))) + temb_BTC[..., : 2 * x.shape[-1]]
    shift, scale = modulation.chunk(2, -1)
    scaled = _compiled_scaled if x.is_cuda else _scaled
    return scaled(norm.norm.eps, x, shift, scale)


def _gated(x: Tensor, gate_BTC: Tensor, y: Tensor) -> Tensor:
    num_times = gate_BTC.shape[1]
    summed = _per_frame(x, num_times).float() + gate_BTC.unsqueeze(2).float() * _per_frame(y, num_times).float()
    return summed.to(x.dtype).flatten(1, 2)


def _heads(x: Tensor, attn: Any) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def _rms(norm: nn.Module, x_BNHD: Tensor) -> Tensor:
    x = x_BNHD.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()


def _rotated(x_BNHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotate halves, float32, as diffusers' `apply_rotary_emb(use_real_unbind_dim=-2)`."""
    first, second = x_BNHD.chunk(2, -1)
    return x_BNHD * cos_ND.unsqueeze(1) + torch.cat([-second, first], -1) * sin_ND.unsqueeze(1)


def _self_attention(attn: Any, x: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    query, key, value = (_heads(y, attn) for y in stacked_linear([attn.to_q, attn.to_k, attn.to_v], x))
    query = _rotated(_rms(attn.norm_q, query), cos_ND, sin_ND).to(x.dtype)
    key = _rotated(_rms(attn.norm_k, key), cos_ND, sin_ND).to(x.dtype)
    return linear(attn.to_out[0], attend(query, *all_tokens(key, value)).flatten(2))


def _text_attention(attn: Any, x: Tensor, context: Tensor) -> Tensor:
    query = _rms(attn.norm_q, _heads(linear(attn.to_q, x), attn)).to(x.dtype)
    key, value = (_heads(y, attn) for y in stacked_linear([attn.to_k, attn.to_v], context))
    key = _rms(attn.norm_k, key).to(x.dtype)
    return attend_to_few(query, key, value).flatten(2)
