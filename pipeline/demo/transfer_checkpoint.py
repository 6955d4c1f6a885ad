"""A tiny Cosmos-Transfer2.5 in the diffusers folder format, with random weights, for tests and trials on a CPU.

VAE, text encoder, tokenizer and scheduler are those of the tiny Cosmos-Predict2.5. The transformer takes image context
and control every second block; the controlnet lies in the folder `controlnet`, its slots, masks and text projection as
in the real one (130 input channels, a copy of the base's projection).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    CosmosControlNetModel,
    CosmosTransformer3DModel,
)

from infer.loading import NoGuardrail
from pipeline.demo.checkpoint import build_tiny_checkpoint

LAYERS = 4
EVERY = 2
IMAGE_TOKENS, IMAGE_WIDTH = 4, 24


def build_tiny_transfer_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint to `folder`, which must not exist, and return it. The same bytes for the same seed."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        predict = build_tiny_checkpoint(building / "predict", seed=seed)
        parts = Cosmos2_5_PredictBasePipeline.from_pretrained(str(predict), safety_checker=NoGuardrail())
        image = {"img_context_dim_in": IMAGE_WIDTH, "img_context_dim_out": _width(parts.transformer)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = CosmosTransformer3DModel(
                **shared_config(parts.transformer),
                **image,
                num_layers=LAYERS,
                controlnet_block_every_n=EVERY,
                in_channels=17,
                out_channels=16,
                concat_padding_mask=True,
                img_context_num_tokens=IMAGE_TOKENS,
            ).eval()
            controlnet = CosmosControlNetModel(
                **shared_config(parts.transformer),
                **image,
                n_controlnet_blocks=LAYERS // EVERY,
                in_channels=130,
                latent_channels=18,
                model_channels=_width(parts.transformer),
            ).eval()
            for model in (transformer, controlnet):
                _tell_apart(model)
        controlnet.crossattn_proj.load_state_dict(transformer.crossattn_proj.state_dict())
        _save(parts, transformer, controlnet, building / "transfer")
        (building / "transfer").rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _tell_apart(model: torch.nn.Module) -> None:
    """Norms of queries and keys begin as ones, all alike; trained ones differ."""
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "_img_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


def assemble_transfer(predict: Path, controlnet: CosmosControlNetModel, folder: Path) -> Path:
    """Write a Transfer checkpoint of a Predict checkpoint's parts and a controlnet to `folder`; return it.

    The base takes the controlnet's residuals evenly, and no image context. Weights are written in float32.
    """
    parts = Cosmos2_5_PredictBasePipeline.from_pretrained(
        str(predict), safety_checker=NoGuardrail(), dtype=torch.float32
    )
    config = dict(parts.transformer.config)
    every = config["num_layers"] // controlnet.config.n_controlnet_blocks
    transformer = CosmosTransformer3DModel.from_config({**config, "controlnet_block_every_n": every})
    transformer.load_state_dict(parts.transformer.state_dict())
    _save(parts, transformer, controlnet, folder)
    return folder


def _save(parts: Any, transformer: CosmosTransformer3DModel, controlnet: CosmosControlNetModel, folder: Path) -> None:
    kept = {name: getattr(parts, name) for name in ("text_encoder", "tokenizer", "vae", "scheduler")}
    pipe = Cosmos2_5_TransferPipeline(
        **kept, transformer=transformer, controlnet=controlnet, safety_checker=NoGuardrail()
    )
    pipe.register_modules(safety_checker=None)
    pipe.save_pretrained(folder, safe_serialization=True)


def _width(transformer: CosmosTransformer3DModel) -> int:
    return transformer.config.num_attention_heads * transformer.config.attention_head_dim


def shared_config(transformer: CosmosTransformer3DModel) -> dict[str, Any]:
    """What the base and the controlnet have in common, the image context apart."""
    config = transformer.config
    names = (
        "num_attention_heads", "attention_head_dim", "mlp_ratio", "text_embed_dim", "adaln_lora_dim", "max_size",
        "patch_size", "rope_scale", "extra_pos_embed_type", "use_crossattn_projection", "crossattn_proj_in_channels",
        "encoder_hidden_states_channels",
    )  # fmt: skip
    return {name: config[name] for name in names}
