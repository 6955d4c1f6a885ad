"""The DiT: Cosmos-Predict2.5's, six blocks and 192 wide, trained from scratch on the base domain.

Model, objective and average are the trainer's own (`train.cosmos25`, `train.dit`, `train.ema`). The loop is not: the
trainer reads one sample at a time from the cache, which is nothing beside a step of the real model and most of a step
of this one, so here whole batches are gathered from a pool on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from pipeline.demo.pretrain.data import base_scenes, drawn
from pipeline.demo.pretrain.loop import Loop
from pipeline.demo.pretrain.text import HIDDEN, LAYERS, LENGTH, contexts_of, negative_prompt_tokens, tokens_of
from pipeline.demo.pretrain.vae import latents_of
from train import cosmos25
from train.activation import set_levels
from train.config import EmaConfig, ObjectiveConfig
from train.dit import accelerate
from train.ema import Ema

OBJECTIVE = ObjectiveConfig()
"""The real model's, unchanged."""

CONTEXT = 96
SAVE_EVERY = 2000
"""Steps."""

NEGATIVE_SHARE = 0.1
"""Share of clips captioned with the default negative prompt, so that guidance away from it is away from no text."""


def build_dit() -> CosmosTransformer3DModel:
    transformer = CosmosTransformer3DModel(
        in_channels=17,
        out_channels=16,
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=6,
        mlp_ratio=4.0,
        text_embed_dim=CONTEXT,
        adaln_lora_dim=32,
        max_size=(128, 240, 240),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 3.0, 3.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=LAYERS * HIDDEN,
        encoder_hidden_states_channels=CONTEXT,
    )
    # AdaLN-Zero (arXiv:2212.09748): blocks begin as identities.
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("linear_2.weight", "linear_2.bias", "proj_out.weight")):
                nn.init.zeros_(parameter)
    return transformer


def train_dit(
    vae: AutoencoderKLWan,
    tokenizer: Qwen2Tokenizer,
    encoder: Qwen2_5_VLForConditionalGeneration,
    *,
    steps: int,
    batch_size: int,
    clips: int,
    device: torch.device,
    save: Callable[[CosmosTransformer3DModel], None],
    length: int = LENGTH,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> None:
    """Train from scratch. clips: drawn and encoded once.

    save: called with the average of the weights over the last steps, now and then and at the end.
    """
    torch.manual_seed(seed)
    vae, encoder = vae.to(device), encoder.to(device)
    found = base_scenes(4000 + seed, clips)
    latents_NCTHW = torch.cat(
        [_normalised(vae, drawn(found[begin : begin + 5000], device)) for begin in range(0, clips, 5000)]
    )
    captions = list(dict.fromkeys(scene.caption for scene in found))
    row = {caption: number for number, caption in enumerate(captions)}
    ids_ML = torch.cat([tokens_of(tokenizer, captions, length)[0], negative_prompt_tokens(tokenizer, length)])
    contexts_MLD = contexts_of(encoder, ids_ML, device)
    rows_N = torch.tensor([row[scene.caption] for scene in found], device=device)
    dit = accelerate(build_dit().to(device)).train()
    set_levels(cosmos25.blocks(dit), ["none"] * len(cosmos25.blocks(dit)), compiled=device.type == "cuda")
    ema = Ema(EmaConfig(kind="power", rate=0.05), dict(dit.named_parameters()))
    loop = Loop("dit", dit.parameters(), steps=steps, lr=lr, device=device)
    shares = torch.tensor([OBJECTIVE.conditioning[n] for n in range(3)], device=device).cumsum(0)

    def loss(index: Tensor) -> dict[str, Tensor]:
        latents = latents_NCTHW[index].float()
        chance_B = torch.rand(len(index), device=device)
        rows_B = torch.where(chance_B < NEGATIVE_SHARE, len(captions), rows_N[index])
        kept_B = chance_B < 1 - OBJECTIVE.text_dropout
        time_B = torch.sigmoid(torch.randn(len(index), device=device))
        conditioning_B = (torch.rand(len(index), 1, device=device) >= shares[:-1]).sum(1)
        batch = {
            "latents": latents,
            "context": contexts_MLD[rows_B] * kept_B[:, None, None],
            "noise": torch.randn_like(latents),
            "sigma": OBJECTIVE.shift * time_B / (1 + (OBJECTIVE.shift - 1) * time_B),
            "num_conditioning": conditioning_B,
        }
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return {"loss": cosmos25.loss(dit, batch, OBJECTIVE).mean()}

    index = torch.empty(batch_size, dtype=torch.long, device=device)

    def after(step: int) -> None:
        ema.update(step)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            with ema.applied():
                save(cosmos25.stock(dit))

    for record in loop.run(loss, index, clips, every=500, after=after):
        loop.say(record)


def _normalised(vae: AutoencoderKLWan, frames_NTHWC: Tensor) -> Tensor:
    """Latents in the model's unit, in bfloat16 on a GPU."""
    mean, std = (
        torch.tensor(values, device=frames_NTHWC.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    scaled = (latents_of(vae, frames_NTHWC) - mean) / std
    return scaled.to(torch.bfloat16 if frames_NTHWC.is_cuda else torch.float32)
