"""Tiny checkpoints of random weights, of transformers' own classes for depth and segments."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
    Sam2VisionConfig,
)

SIDE = 64


def tiny_depth(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
            out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
        )  # fmt: skip
        config = DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            head_hidden_size=8,
        )  # fmt: skip
        DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 56, "width": 56}, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def tiny_segments(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Sam2HieraDetConfig(
            hidden_size=8, image_size=[SIDE, SIDE], blocks_per_stage=[1, 2, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
            num_attention_heads_per_stage=[1, 1, 1, 1], window_size_per_stage=[4, 4, 4, 4],
            global_attention_blocks=[4], window_positional_embedding_background_size=[4, 4],
        )  # fmt: skip
        vision = Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=128,
        )  # fmt: skip
        config = Sam2VideoConfig(
            vision_config=vision,
            prompt_encoder_config={"hidden_size": 128, "image_size": SIDE, "mask_input_channels": 4},
            mask_decoder_config={
                "hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            },
            image_size=SIDE, memory_attention_hidden_size=128, memory_attention_num_layers=1,
            memory_attention_feed_forward_hidden_size=32, memory_encoder_hidden_size=128,
            memory_encoder_output_channels=64, memory_attention_rope_feat_sizes=[4, 4], mask_downsampler_embed_dim=128,
            memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32,
        )  # fmt: skip
        Sam2VideoModel(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = Sam2VideoProcessor(Sam2ImageProcessor(size=size), Sam2VideoVideoProcessor(size=size))
    processor.save_pretrained(folder)
    return folder
