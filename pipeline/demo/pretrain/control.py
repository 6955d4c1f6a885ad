"""The controlnet: one block that follows edges, trained by the stages every user runs, on a CPU too."""

from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import CosmosControlNetModel, CosmosTransformer3DModel
from torch import nn

from manifests.config import ModelConfig
from pipeline.demo.transfer_checkpoint import assemble_transfer, shared_config
from pipeline.demo.videos import make_videos
from pipeline.demo.world import scenes
from pipeline.encode_stage import encode_stage
from pipeline.recipe import load_recipe
from pipeline.stages import train_stage
from train.cosmos_transfer25 import export_controlnet

KIND = "edge"
SLOTS = 8
"""Of latents in a controlnet's input, as in the released ones, beside its two masks."""


def build_controlnet(transformer: CosmosTransformer3DModel) -> CosmosControlNetModel:
    """A copy of the base's embedders and first block whose residual is zero, so that training begins with the base."""
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    net = CosmosControlNetModel(
        **shared_config(transformer),
        n_controlnet_blocks=1,
        in_channels=SLOTS * transformer.config.out_channels + 2,
        latent_channels=transformer.config.in_channels + 1,
        model_channels=width,
    )
    for mine, its in (
        (net.patch_embed_base, transformer.patch_embed),
        (net.time_embed, transformer.time_embed),
        (net.crossattn_proj, transformer.crossattn_proj),
    ):
        mine.load_state_dict(its.state_dict())
    block = net.control_blocks[0]
    strange = block.load_state_dict(transformer.transformer_blocks[0].state_dict(), strict=False)
    assert {name.split(".")[0] for name in strange.missing_keys} == {"before_proj", "after_proj"}
    for projection in (block.before_proj, block.after_proj):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    return net


def train_control(checkpoint: Path, *, num_videos: int, steps: int) -> None:
    """Train on the edges of base clips and write `checkpoint/controlnet`, in bfloat16."""
    transformer = CosmosTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", dtype=torch.float32)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first = build_controlnet(copy.deepcopy(transformer))
        model = assemble_transfer(checkpoint, first, folder / "checkpoint")
        make_videos(folder / "data", itertools.islice(scenes(5000), num_videos))
        recipe = load_recipe(
            "demo",
            [
                f"model.path={model}",
                "model.family=cosmos-transfer2.5",
                f"data.datasets.sks.path={folder / 'data'}",
                f"encode.cache={folder / 'cache'}",
                "encode.executor=local",
                f"encode.hints.kinds=['{KIND}']",
                "encode.hints.variants=2",
                f"train.output={folder / 'train'}",
                f"train.hints.{KIND}=1",
                "train.method=control",
                f"train.steps={steps}",
                "train.batch_size=16",
                "train.micro_batch_size=16",
                "train.optimizer.lr=1e-3",
                f"train.checkpoint_every={steps}",
            ],
        )
        encode_stage(recipe)
        train_stage(recipe)
        trained = folder / "train" / "adapter" / "trained_weights.safetensors"
        shutil.rmtree(checkpoint / "controlnet", ignore_errors=True)
        export_controlnet(ModelConfig(path=str(model)), trained, checkpoint / "controlnet", [KIND], torch.bfloat16)
