"""`python -m pipeline.demo.pretrain OUTPUT`: the embedded model's weights, from nothing, in minutes on one GPU."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from diffusers import Cosmos2_5_PredictBasePipeline

from infer.cosmos25 import NoGuardrail
from pipeline.demo.checkpoint import build_scheduler
from pipeline.demo.pretrain.data import base_scenes, drawn
from pipeline.demo.pretrain.dit import train_dit
from pipeline.demo.pretrain.text import train_text
from pipeline.demo.pretrain.vae import psnr, train_vae
from pipeline.report import log


def pretrain(
    output: Annotated[Path, typer.Argument(help="Folder the checkpoint is written to.")],
    vae_steps: int = 4000,
    text_steps: int = 2000,
    dit_steps: int = 12000,
    clips: int = 60_000,
) -> None:
    """Train VAE, text encoder and DiT, and write them as one diffusers checkpoint in bfloat16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = perf_counter()
    vae = train_vae(steps=vae_steps, batch_size=64, clips=20_000, device=device)
    log(f"vae: {psnr(vae, drawn(base_scenes(9, 200), device)):.2f} dB on clips it was not trained on")
    tokenizer, encoder = train_text(steps=text_steps, batch_size=128, captions=40_000, device=device)
    dit = train_dit(vae, tokenizer, encoder, steps=dit_steps, batch_size=256, clips=clips, device=device)
    pipeline = Cosmos2_5_PredictBasePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.to("cpu", torch.bfloat16),
        transformer=dit.to("cpu", torch.bfloat16),
        vae=vae.to("cpu", torch.bfloat16),
        scheduler=build_scheduler(),
        safety_checker=NoGuardrail(),
    )
    pipeline.register_modules(safety_checker=None)  # as in the released checkpoints: not a stored part
    pipeline.save_pretrained(output, safe_serialization=True)
    log(f"{output}: done in {perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(pretrain)
