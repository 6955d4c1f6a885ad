"""`python -m pipeline.demo.pretrain OUTPUT`: the embedded model's weights, from nothing, in minutes on one GPU."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKLWan, Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from infer.loading import NoGuardrail
from pipeline.demo.checkpoint import build_scheduler
from pipeline.demo.pretrain.control import train_control
from pipeline.demo.pretrain.data import base_scenes, drawn
from pipeline.demo.pretrain.dit import train_dit
from pipeline.demo.pretrain.text import LENGTH, train_text
from pipeline.demo.pretrain.vae import Phase, psnr, train_vae
from pipeline.report import log


@dataclass(frozen=True)
class Sizes:
    """How much is trained. clips: drawn for the DiT; a third as many for the VAE. length: tokens of a caption.

    control_videos: files, for the controlnet is trained by the stages every user runs.
    """

    vae: tuple[Phase, ...] = (Phase(18_500, 8, 17, share=0.75),)
    text_steps: int = 1400
    dit_steps: int = 15_000
    batch_size: int = 128
    clips: int = 36_000
    length: int = LENGTH
    control_videos: int = 240
    control_steps: int = 1500


def pretrain(output: Path, sizes: Sizes, *, device: torch.device) -> None:
    """Train VAE, text encoder, DiT and controlnet, and write them as one diffusers checkpoint in bfloat16.

    Parts that are in `output` already are not trained again, so a run that was cut off goes on with the next part; the
    DiT is trained on what the stored, rounded VAE and text encoder compute, the controlnet on the stored DiT.
    """
    started = perf_counter()
    torch.backends.cudnn.benchmark = True
    if not (output / "vae").is_dir():
        _store(train_vae(sizes.vae, clips=sizes.clips // 3, device=device), output / "vae")
    vae = AutoencoderKLWan.from_pretrained(output, subfolder="vae", torch_dtype=torch.float32).to(device).eval()
    clips = drawn(base_scenes(9, min(200, sizes.clips)), device)
    log(f"vae: {psnr(vae, clips):.2f} dB on clips it was not trained on")
    if not (output / "text_encoder").is_dir():
        tokenizer, encoder = train_text(
            steps=sizes.text_steps,
            batch_size=sizes.batch_size,
            captions=sizes.clips * 2 // 3,
            device=device,
            length=sizes.length,
        )
        tokenizer.save_pretrained(output / "tokenizer")
        _store(encoder, output / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(output, subfolder="tokenizer")
    encoder = _text_encoder(output, torch.float32).to(device).eval()
    if not (output / "transformer").is_dir():
        train_dit(
            vae,
            tokenizer,
            encoder,
            steps=sizes.dit_steps,
            batch_size=sizes.batch_size,
            clips=sizes.clips,
            device=device,
            length=sizes.length,
            save=lambda dit: _store(dit, output / "transformer"),
        )
    pipeline = Cosmos2_5_PredictBasePipeline(
        tokenizer=tokenizer,
        text_encoder=_text_encoder(output, torch.bfloat16),
        transformer=CosmosTransformer3DModel.from_pretrained(
            output, subfolder="transformer", torch_dtype=torch.bfloat16
        ),
        vae=AutoencoderKLWan.from_pretrained(output, subfolder="vae", torch_dtype=torch.bfloat16),
        scheduler=build_scheduler(),
        safety_checker=NoGuardrail(),
    )
    pipeline.register_modules(safety_checker=None)  # as in the released checkpoints: not a stored part
    pipeline.save_pretrained(output, safe_serialization=True)
    if not (output / "controlnet").is_dir():
        train_control(output, num_videos=sizes.control_videos, steps=sizes.control_steps)
    for part in ("vae", "transformer", "controlnet"):
        path = output / part / "config.json"
        config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")
    log(f"{output}: done in {perf_counter() - started:.0f} s")


def _store(model: Any, folder: Path) -> None:
    """Write a model's weights in bfloat16; the model itself keeps its own."""
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)


def _text_encoder(output: Path, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(output, subfolder="text_encoder", torch_dtype=dtype)


def main(output: Annotated[Path, typer.Argument(help="Folder the checkpoint is written to.")]) -> None:
    pretrain(output, Sizes(), device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    typer.run(main)
