"""Guided sampling at real size: diffusers' pipeline against ours, in one process on one GPU, random weights.

    python -m benchmarks.inference [--steps 5] [--scale-to 36] [--linears dtype,fp8] [--commit REV] [--output FILE]

Both start from contexts at hand and end with frames in host memory, as floats (diffusers) and as bytes (ours).
`--steps` steps are measured, and the whole is scaled: seconds a step times `--scale-to`, plus what does not depend on
steps (VAE encode and decode). The pipelines take turns, so that all see the GPU as warm. The correctness check comes
first: one prediction of the transformer and one decoded clip, both in bfloat16, against float32; one with the base's
linear layers in 8 bits, whose error is larger and reported. So is the PSNR of all frames against diffusers'.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from PIL import Image

from benchmarks.real_checkpoint import TRANSFORMER_2B, bfloat16_on
from benchmarks.report import add_arguments, bullets, report, table
from benchmarks.training_step import DEVICE, clear, peak_gib
from encode.cosmos25_models import accelerate_vae
from infer import denoise as loop
from infer.loading import NoGuardrail
from pipeline.demo.checkpoint import build_scheduler
from train.activation import set_levels
from train.cosmos25 import TOKEN_LINEARS
from train.dit import accelerate
from train.fp8 import quantise_base

GUIDANCE = 7.0


def build() -> Any:
    """The pipeline without its text encoder, which no step needs."""
    torch.manual_seed(0)
    with bfloat16_on("cuda"):
        transformer = CosmosTransformer3DModel(**TRANSFORMER_2B).eval().requires_grad_(False)
        vae = AutoencoderKLWan().eval().requires_grad_(False)
    pipe = Cosmos2_5_PredictBasePipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=build_scheduler(),
        safety_checker=NoGuardrail(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def check(transformer: CosmosTransformer3DModel, fast: CosmosTransformer3DModel, raw: torch.Tensor) -> str:
    """Error of one prediction against float32; ours must not be larger than the stock forward's."""
    shape = (1, 16, 6, 30, 52)
    noisy = torch.randn(shape, device="cuda").bfloat16()
    given = {
        "hidden_states": noisy,
        "timestep": torch.full((1, 1, 6, 1, 1), 0.5, device="cuda"),
        "condition_mask": torch.zeros(1, 1, *shape[2:], device="cuda", dtype=torch.bfloat16),
        "padding_mask": torch.zeros(1, 1, 240, 416, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": raw,
        "return_dict": False,
    }
    exact_model = copy.deepcopy(transformer).float()
    floats = {name: value.float() if torch.is_tensor(value) else value for name, value in given.items()}
    exact = exact_model(**floats)[0]
    errors = {}
    eight_bits = copy.deepcopy(fast)
    quantise_base(eight_bits.transformer_blocks, TOKEN_LINEARS, DEVICE)
    for name, model in (("stock", transformer), ("ours", fast), ("fp8", eight_bits)):
        output = model(**given)[0].float()
        errors[name] = float((output - exact).norm() / exact.norm())
    if errors["ours"] > errors["stock"] * 1.02 or not errors["fp8"] < 0.2:
        raise SystemExit(f"ours is less exact than stock bfloat16, or far off in 8 bits: {errors}")
    return "error of a prediction against float32: " + ", ".join(
        f"{name} {error:.4f}" for name, error in errors.items()
    )


@torch.no_grad()
def check_decode(vae: AutoencoderKLWan, fast: AutoencoderKLWan) -> str:
    """Error of decoded frames against float32; ours must not be larger than the stock decoder's."""
    latents = torch.randn(1, 16, 12, 30, 52, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    torch.backends.cudnn.allow_tf32 = False
    exact = copy.deepcopy(vae).float().decode(latents).sample
    torch.backends.cudnn.allow_tf32 = True
    decoded = {"stock": vae.decode(latents.bfloat16()).sample, "ours": fast.decode(latents.bfloat16()).sample}
    errors = {name: float((frames.float() - exact).norm() / exact.norm()) for name, frames in decoded.items()}
    if not errors["ours"] <= errors["stock"] * 1.02:
        raise SystemExit(f"our decoder is less exact than stock bfloat16: {errors}")
    return f"error of decoded frames against float32: stock {errors['stock']:.4f}, ours {errors['ours']:.4f}"


def psnr(squared_error: float) -> float:
    return -10 * math.log10(squared_error)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time in seconds, and what the call returns."""
    torch.cuda.synchronize()
    begin = time.monotonic()
    result = call()
    torch.cuda.synchronize()
    return time.monotonic() - begin, result


def weights_gib(pipe: Any) -> float:
    return sum(tensor.nbytes for part in (pipe.transformer, pipe.vae) for tensor in part.parameters()) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=432)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num-frames", type=int, default=93)
    parser.add_argument("--steps", type=int, default=5, help="measured")
    parser.add_argument("--scale-to", type=int, default=36)
    parser.add_argument("--modes", default="text,image")
    parser.add_argument("--linears", default="dtype", help="of the base, ours: dtype, or dtype,fp8 for both")
    parser.add_argument("--rounds", type=int, default=3, help="of every pipeline in turn, whose median counts")
    add_arguments(parser)
    options = parser.parse_args()
    pipe = build()
    size = {"height": options.height, "width": options.width, "num_frames": options.num_frames}
    generator = torch.Generator("cuda").manual_seed(1)
    raws = [torch.randn(1, 512, 100_352, device="cuda", generator=generator).bfloat16() for _ in range(2)]
    fast = copy.copy(pipe)
    fast.transformer = accelerate(copy.deepcopy(pipe.transformer))
    fast.vae = copy.deepcopy(pipe.vae)
    accelerate_vae(fast.vae)
    notes = [check(pipe.transformer, fast.transformer, raws[0]), check_decode(pipe.vae, fast.vae)]
    print(*notes, sep="\n", flush=True)
    with torch.no_grad():
        contexts = [loop.project(fast.transformer, raw) for raw in raws]
    image = Image.effect_noise((options.width, options.height), 64).convert("RGB")
    pixels = pipe.video_processor.preprocess_video([image], options.height, options.width).cuda().bfloat16()

    def stock(mode: str, steps: int) -> Any:
        return pipe(
            image=image if mode == "image" else None,
            prompt_embeds=raws[0],
            negative_prompt_embeds=raws[1],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
            **size,
        ).frames[0]

    def ours(own: Any, mode: str, steps: int) -> Any:
        latents = loop.denoise(
            own,
            contexts,
            condition_BCTHW=pixels if mode == "image" else None,
            num_steps=steps,
            guidance=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(0),
            conditioning_timestep=0.0001,
            on_step=lambda: None,
            **size,
        )
        return loop.to_bytes(loop.decode(own, latents, options.num_frames))

    pipelines = {"diffusers": (stock, pipe), "ours": (partial(ours, fast), fast)}
    if "fp8" in options.linears.split(","):
        eight_bits = copy.copy(fast)
        eight_bits.transformer = copy.deepcopy(fast.transformer)
        quantise_base(eight_bits.transformer.transformer_blocks, TOKEN_LINEARS, DEVICE)
        pipelines["ours, fp8 linears"] = (partial(ours, eight_bits), eight_bits)
    for _, own in list(pipelines.values())[1:]:
        blocks = list(own.transformer.transformer_blocks)
        set_levels(blocks, ["none"] * len(blocks), compiled=True)
    rows = []
    frames = {}
    for mode in options.modes.split(","):
        for call, _ in pipelines.values():
            call(mode, 1)  # kernels are chosen, compiled and loaded
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
        peaks = {}
        for _, (name, (call, own)) in itertools.product(range(options.rounds), pipelines.items()):
            clear()
            resident = torch.cuda.memory_allocated() / 2**30
            one, _ = timed(partial(call, mode, 1))
            many, frames[name, mode] = timed(partial(call, mode, options.steps))
            step = (many - one) / (options.steps - 1)
            times[name].append((step, one - step))
            peaks[name] = peak_gib() - resident + weights_gib(own)
        for name, measured in times.items():
            step, rest = (statistics.median(values) for values in zip(*measured, strict=True))
            rows.append((name, mode, step, rest, rest + step * options.scale_to, peaks[name]))
            print(*rows[-1], measured, flush=True)
    for (name, mode), video in frames.items():
        if name != "diffusers":
            off = float(np.square(np.float32(video) / 255 - frames["diffusers", mode]).mean())
            notes.append(f"{name}, {mode}: PSNR of {options.steps} steps' frames against diffusers' {psnr(off):.1f} dB")
    shape = (1, 16, (options.num_frames - 1) // 4 + 1, options.height // 8, options.width // 8)
    kernel = loop._kernel_for(fast.transformer, torch.empty(shape, device="cuda"), 2)
    notes.append(f"attention: {kernel}; {options.steps} steps measured, scaled to {options.scale_to}")
    baselines = {row[1]: row[4] for row in rows if row[0] == "diffusers"}
    lines = [
        f"| {name} | {mode} | {step:.3f} | {rest:.2f} | {whole:.1f} | {peak:.1f} | {baselines[mode] / whole:.2f} |"
        for name, mode, step, rest, whole, peak in rows
    ]
    report(
        options,
        f"{options.scale_to}-step guided sampling at {options.height}x{options.width}x{options.num_frames}, bf16",
        table(
            ["pipeline", "from", "s/step", "rest s", f"{options.scale_to} steps s", "peak GiB", "diffusers / this"],
            lines,
        ),
        bullets(notes),
        command=f"python -m benchmarks.inference --steps {options.steps} --linears {options.linears}",
        packages=("torch", "diffusers", "transformers", "peft"),
    )


if __name__ == "__main__":
    main()
