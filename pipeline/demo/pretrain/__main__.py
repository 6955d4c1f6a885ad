"""`python -m pipeline.demo.pretrain OUTPUT`: the embedded model's weights, from nothing, in minutes on one GPU."""

from __future__ import annotations

from dataclasses import dataclass
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
from pipeline.demo.pretrain.text import LENGTH, train_text
from pipeline.demo.pretrain.vae import Phase, psnr, train_vae
from pipeline.report import log


@dataclass(frozen=True)
class Sizes:
    """How much is trained. clips: drawn for the DiT; a third as many for the VAE. length: tokens of a caption."""

    vae: tuple[Phase, ...] = (Phase(8000, 16, 17, share=0.75),)
    text_steps: int = 1400
    dit_steps: int = 12_000
    batch_size: int = 128
    clips: int = 60_000
    length: int = LENGTH


def pretrain(output: Path, sizes: Sizes, *, device: torch.device) -> None:
    """Train VAE, text encoder and DiT, and write them as one diffusers checkpoint in bfloat16.

    The first two are also written, in float32, as soon as they are there: a run that is cut off has not lost them.
    """
    started = perf_counter()
    vae = train_vae(sizes.vae, clips=sizes.clips // 3, device=device)
    vae.save_pretrained(output / "vae")
    log(f"vae: {psnr(vae, drawn(base_scenes(9, min(200, sizes.clips)), device)):.2f} dB on clips it was not trained on")
    tokenizer, encoder = train_text(
        steps=sizes.text_steps,
        batch_size=sizes.batch_size,
        captions=sizes.clips * 2 // 3,
        device=device,
        length=sizes.length,
    )
    tokenizer.save_pretrained(output / "tokenizer")
    encoder.save_pretrained(output / "text_encoder")
    dit = train_dit(
        vae,
        tokenizer,
        encoder,
        steps=sizes.dit_steps,
        batch_size=sizes.batch_size,
        clips=sizes.clips,
        device=device,
        length=sizes.length,
    )
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


def main(output: Annotated[Path, typer.Argument(help="Folder the checkpoint is written to.")]) -> None:
    pretrain(output, Sizes(), device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    typer.run(main)
