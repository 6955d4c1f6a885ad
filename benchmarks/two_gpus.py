"""Two GPUs under NCCL against one: a sample shared by tokens, weights split, and guided sampling shared.

    python -m benchmarks.two_gpus [--parts training,sampling] [--commit REV] [--output FILE]

Training runs through `latentline train` from a cache of random latents at 432x768x93; losses must be those of one GPU
within bfloat16's tolerance, step by step. Sampling runs the denoising loop on random weights in the real shapes, shared
as `infer.parallel` says. Guidance makes bfloat16's rounding large: latents may be as far from one GPU's as those that
the same GPU computes with its two predictions one after the other instead of as a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_job import latent_shape, make_job, recipe_of, records_of, seconds_per_step
from benchmarks.report import add_arguments, report
from infer import denoise as loop
from infer.team import Layout, in_team, open_store
from pipeline.demo.checkpoint import build_tiny_checkpoint
from pipeline.recipe import resolved, to_toml
from train.parallel import barrier, join

STEPS, MEASURED = 5, 2
TOLERANCE = 0.01
EXACT = 1e-4
"""Distance that is rounding whatever the dtype."""

TRAINING: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("1 GPU, batch 1", 1, {"batch_size": 1}),
    ("1 GPU, batch 2", 1, {"batch_size": 2}),
    ("2 GPUs a sample, batch 1", 2, {"batch_size": 1, "context_parallel": 2}),
    ("2 GPUs, weights split, batch 2", 2, {"batch_size": 2, "parallel": "hybrid"}),
)
LAYOUTS = {"cfg": Layout(1, 2, 1), "context": Layout(1, 1, 2), "requests": Layout(2, 1, 1)}


def train(
    folder: Path, job: tuple[Path, str], gpus: int, settings: dict[str, Any], device: str | None = None
) -> dict[str, Any]:
    """Losses, seconds a step and peak of a run; device: the one GPU it sees."""
    output = Path(tempfile.mkdtemp(dir=folder))
    path = output.with_suffix(".toml")
    recipe = recipe_of(*job, output, steps=STEPS, activation="selective", **settings)
    path.write_text(to_toml(resolved(recipe)))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(path), "--gpus", str(gpus)]
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    records = records_of(output)
    return {
        "losses": [record["loss"] for record in records],
        "seconds": seconds_per_step(records, MEASURED),
        "peak": records[-1].get("peak_memory_bytes", 0) / 2**30,
    }


def training(folder: Path, tiny: bool) -> list[str]:
    job = make_job(folder, shape=latent_shape(432, 768), samples=8, tiny=tiny)
    lines = ["| training | s/step | samples/s | peak GiB a GPU | losses, first and last | farthest from 1 GPU |"]
    lines += ["|---|---|---|---|---|---|"]
    alone: dict[int, list[float]] = {}
    single = [settings for _, gpus, settings in TRAINING if gpus == 1]
    with ThreadPoolExecutor(len(single)) as pool:  # side by side, each on a GPU of its own
        ready = list(pool.map(lambda at: train(folder, job, 1, at[1], str(at[0])), enumerate(single)))
    for name, gpus, settings in TRAINING:
        got = ready.pop(0) if gpus == 1 else train(folder, job, gpus, settings)
        losses = got["losses"]
        expected = alone.setdefault(settings["batch_size"], losses)
        apart = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        rate = settings["batch_size"] / got["seconds"]
        ends = f"{losses[0]:.4f}, {losses[-1]:.4f}"
        lines.append(f"| {name} | {got['seconds']:.3f} | {rate:.3f} | {got['peak']:.1f} | {ends} | {apart:.3%} |")
        print(lines[-1], flush=True)
        if apart > TOLERANCE:
            raise SystemExit(f"{name}: losses {losses}, on one GPU {expected}")
    return lines


def sampling_rank(steps: int, tiny: bool, folder: Path) -> None:
    """One rank's part, under torchrun: every layout checked against this rank alone, then timed."""
    from benchmarks.inference import GUIDANCE, build
    from infer.loading import NoGuardrail
    from train.activation import set_levels
    from train.dit import accelerate

    with join() as ranks:
        if tiny:
            from diffusers import Cosmos2_5_PredictBasePipeline

            pipe = Cosmos2_5_PredictBasePipeline.from_pretrained(folder / "checkpoint", safety_checker=NoGuardrail())
            size, context = {"height": 32, "width": 48, "num_frames": 9}, (8, 64)
        else:
            pipe, size, context = build(), {"height": 432, "width": 768, "num_frames": 93}, (512, 1024)
        blocks = accelerate(pipe.transformer).transformer_blocks
        if ranks.device.type == "cuda":
            set_levels(list(blocks), ["none"] * len(blocks), compiled=True)
        generator = torch.Generator().manual_seed(3)
        dtype = pipe.transformer.dtype
        contexts = [torch.randn(1, *context, generator=generator).to(ranks.device, dtype) for _ in range(2)]

        def run(num_steps: int, **shared: Any) -> tuple[torch.Tensor, float]:
            barrier(ranks)
            begin = time.monotonic()
            latents = loop.denoise(
                pipe,
                contexts,
                condition_BCTHW=None,
                num_steps=num_steps,
                guidance=GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(0),
                conditioning_timestep=0.0001,
                on_step=lambda: None,
                **size,
                **shared,
            ).cpu()
            return latents, time.monotonic() - begin

        def timed(**shared: Any) -> tuple[torch.Tensor, float]:
            run(1, **shared)
            latents, many = run(steps, **shared)
            return latents, (many - run(1, **shared)[1]) / (steps - 1)

        def distance(latents: torch.Tensor, others: torch.Tensor) -> float:
            return float((latents - others).norm() / others.norm())

        expected, alone = timed(together=True)
        one_by_one, seconds = timed(together=False)
        rounding = distance(one_by_one, expected)
        rows = [("1 GPU", alone, 0.0, rounding, 1.0), ("1 GPU, a prompt at a time", seconds, rounding, 0.0, 1.0)]
        store = open_store(ranks)
        for name, layout in LAYOUTS.items():
            with in_team(ranks, layout, store) as team:
                latents, seconds = timed(guidance_ranks=team.guidance, context_ranks=team.context)
            videos = layout.teams * alone / seconds
            rows.append(
                (f"2 GPUs, {name}", seconds, distance(latents, expected), distance(latents, one_by_one), videos)
            )
        if ranks.is_main:
            (folder / "sampling.json").write_text(json.dumps(rows))
            for row in rows:
                print(*row, flush=True)
        if any(min(whole, halves) > max(1.25 * rounding, EXACT) for _, _, whole, halves, _ in rows):
            raise SystemExit(f"latents differ from one GPU's: {rows}")


def sampling(folder: Path, tiny: bool, steps: int) -> list[str]:
    if tiny and not (folder / "checkpoint").exists():
        build_tiny_checkpoint(folder / "checkpoint")
    own = ["--rank", "--folder", str(folder), "--steps", str(steps), *(["--tiny"] if tiny else [])]
    runner = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
    subprocess.run([*runner, "-m", "benchmarks.two_gpus", *own], check=True)
    columns = ["guided sampling", "s/step", "videos a second, of 1 GPU's", "latents, distance from 1 GPU's"]
    lines = [f"| {' | '.join([*columns, 'and from a prompt at a time'])} |", "|---|---|---|---|---|"]
    for name, seconds, whole, halves, videos in json.loads((folder / "sampling.json").read_text()):
        lines.append(f"| {name} | {seconds:.3f} | {videos:.2f} | {whole:.4f} | {halves:.4f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="training,sampling")
    parser.add_argument("--steps", type=int, default=4, help="of sampling, timed")
    parser.add_argument("--tiny", action="store_true", help="try the script with the demo's model; no numbers")
    parser.add_argument("--rank", action="store_true", help="be one rank of the sampling, under torchrun")
    parser.add_argument("--folder", type=Path, help="where the job is, or is made and left")
    add_arguments(parser)
    options = parser.parse_args()
    if options.rank:
        sampling_rank(options.steps, options.tiny, options.folder)
        return
    with tempfile.TemporaryDirectory(prefix="latentline-") as temporary:
        folder = options.folder or Path(temporary)
        tables = []
        if "training" in options.parts:
            tables.append(training(folder, options.tiny))
        if "sampling" in options.parts:
            tables.append(sampling(folder, options.tiny, options.steps))
    report(
        options,
        "Two GPUs against one, 432x768x93, bfloat16, random weights and samples",
        *("\n".join(lines) for lines in tables),
        f"Training: LoRA r32, `activation = selective`, medians of the last {MEASURED} of {STEPS} steps. With one "
        "machine `hybrid` splits the base over its two GPUs, as `shard` does. `requests`: a video each.",
        command="python -m benchmarks.two_gpus",
        gpus=2,
    )


if __name__ == "__main__":
    main()
