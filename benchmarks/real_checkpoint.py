"""Build a Cosmos-Predict2.5-2B checkpoint of the real shapes with random weights: speed does not depend on values.

    python benchmarks/real_checkpoint.py FOLDER

The shapes are those of `nvidia/Cosmos-Predict2.5-2B` (2.06B transformer, Wan 2.1 VAE, Qwen2.5-VL-7B text encoder);
about 21 GiB of bfloat16. The tokenizer is the demo's byte-level one: its ids lie within the real vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from infer.loading import NoGuardrail
from pipeline.demo.checkpoint import build_scheduler, build_tokenizer

TRANSFORMER_2B = {
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 28,
    "mlp_ratio": 4.0,
    "text_embed_dim": 1024,
    "adaln_lora_dim": 256,
    "max_size": (128, 240, 240),
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 3.0, 3.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100_352,
    "encoder_hidden_states_channels": 1024,
}
TEXT_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "rope_parameters": {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 128_000,
    "tie_word_embeddings": False,
}


@contextmanager
def bfloat16_on(device: str) -> Iterator[None]:
    """Build modules in bfloat16 on a device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(folder: Path, device: str = "cuda") -> Path:
    """Write the checkpoint to `folder`, unless it is there."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    with bfloat16_on(device):
        transformer = CosmosTransformer3DModel(**TRANSFORMER_2B)
        vae = AutoencoderKLWan()
        text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT_7B))
    pipe = Cosmos2_5_PredictBasePipeline(
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=build_scheduler(),
        safety_checker=NoGuardrail(),
    )
    pipe.save_pretrained(folder)
    return folder


def build_trainable(folder: Path, device: str = "cuda") -> Path:
    """Write what training reads of a checkpoint, without the text encoder: 4.5 GiB."""
    torch.manual_seed(0)
    with bfloat16_on(device):
        CosmosTransformer3DModel(**TRANSFORMER_2B).save_pretrained(folder / "transformer")
        AutoencoderKLWan().save_pretrained(folder / "vae")
    return folder


if __name__ == "__main__":
    build(Path(sys.argv[1]))
