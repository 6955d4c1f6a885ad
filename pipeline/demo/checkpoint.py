"""The embedded model: a tiny Cosmos-Predict2.5 in the diffusers folder format, with random weights.

Every component is of the real class and loads with the real calls; only widths and depths are small. What
changes the meaning of a tensor is kept as in the real model: VAE strides 4 x 8 x 8 and its 16 latent means
and deviations, 17 input channels, the text projection, the chat format, the flow scheduler. Videos made with
it are noise: it exists to run the whole pipeline on a CPU.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    UniPCMultistepScheduler,
)
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from infer.cosmos25 import DEFAULT_NEGATIVE_PROMPT, SYSTEM_PROMPT
from infer.loading import NoGuardrail
from manifests.errors import UsageError

BUILDER_VERSION = 1
"""Raised whenever the same seed would give other files."""

MARKER = "tiny_checkpoint.json"

TEXT_LAYERS = 2
TEXT_HIDDEN = 64
CONTEXT_DIM = 64
LATENT_CHANNELS = 16
TEXT_VOCAB = 768

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# A message's content is a string or a list of {"type": "text", "text": ...}.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for item in message['content'] -%}{{ item['text'] }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def build_tiny_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint to `folder` and return it; at once if this version and seed is already there.

    Weights are float32 safetensors, the same bytes for the same `seed` and library versions. The folder
    appears complete or not at all. Raises UsageError if `folder` holds anything else.
    """
    folder = Path(folder)
    marker = {"builder_version": BUILDER_VERSION, "seed": seed}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if _read_marker(folder) == marker:
            return folder
        if _read_marker(folder) is None:
            raise UsageError(f"{folder}: not empty and not a tiny checkpoint; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline = _build_pipeline()
        pipeline.register_modules(safety_checker=None)  # as in the released checkpoints: not a stored part
        pipeline.save_pretrained(building, safe_serialization=True)
        (building / MARKER).write_text(json.dumps(marker) + "\n")
        building.chmod(0o755)
        if folder.is_dir():
            shutil.rmtree(folder)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _read_marker(folder: Path) -> dict[str, int] | None:
    path = folder / MARKER
    return json.loads(path.read_text()) if path.is_file() else None


def _build_pipeline() -> Cosmos2_5_PredictBasePipeline:
    tokenizer = build_tokenizer(vocab_size=TEXT_VOCAB)
    return Cosmos2_5_PredictBasePipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer, vocab_size=TEXT_VOCAB, layers=TEXT_LAYERS, hidden=TEXT_HIDDEN),
        transformer=_build_transformer(),
        vae=_build_vae(),
        scheduler=build_scheduler(),
        safety_checker=NoGuardrail(),
    )


def build_tokenizer(captions: Sequence[str] = (), *, vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE: any text is representable, and common words are one token, so captions fit in 512.

    captions: further text to find common words in. vocab_size: tokens, the special ones included.
    """
    corpus = [
        SYSTEM_PROMPT,
        DEFAULT_NEGATIVE_PROMPT,
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n",
    ] * 2
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [*corpus, *captions], vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(
    tokenizer: Qwen2Tokenizer, *, vocab_size: int, layers: int, hidden: int, tied: bool = False
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of `layers` text layers, `hidden` wide; its other sizes are as small as the class allows.

    tied: tokens are embedded and predicted by the same weights.
    """
    token_id = tokenizer.convert_tokens_to_ids
    heads, kv_heads = 4, 2
    head_dim = hidden // heads
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 2048,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [head_dim // 8, head_dim // 16 * 3, head_dim // 16 * 3],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=tied,
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).to(torch.float32).eval()


def _build_transformer() -> CosmosTransformer3DModel:
    # The torch default for nn.Linear leaves no layer at zero, so gates are open and an adapter shows at once.
    return CosmosTransformer3DModel(
        in_channels=LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        mlp_ratio=4.0,
        text_embed_dim=CONTEXT_DIM,
        adaln_lora_dim=16,
        max_size=(128, 240, 240),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 3.0, 3.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=TEXT_LAYERS * TEXT_HIDDEN,
        encoder_hidden_states_channels=CONTEXT_DIM,
    ).eval()


def _build_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS, num_res_blocks=1)
    with torch.no_grad():
        # Random weights map any video to nearly the same latents; spread them to the real model's scale.
        mean = torch.tensor(vae.config.latents_mean)
        std = torch.tensor(vae.config.latents_std)
        weight = vae.quant_conv.weight
        torch.nn.init.normal_(weight, std=4.0 / math.sqrt(weight.shape[1]))
        weight[:LATENT_CHANNELS] *= std.view(-1, 1, 1, 1, 1)
        vae.quant_conv.bias[:LATENT_CHANNELS] = mean
    return vae.eval()


def build_scheduler() -> UniPCMultistepScheduler:
    # Karras sigmas s from 200 to 0.01, then s / (s + 1): the flow sigma, in (0, 1).
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_karras_sigmas=True,
        use_flow_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.01,
    )
