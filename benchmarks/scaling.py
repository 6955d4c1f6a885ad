"""Training on 1 and on several GPUs of one machine, from real shards, through the command line users run.

    python -m benchmarks.scaling --videos FOLDER --gpus 4 [--checkpoint FOLDER] [--commit REV] [--output FILE]

Encodes the videos of FOLDER (`videos/*.mp4`, `metas/*.txt`) once, with random weights in the real shapes at 432x768x93,
then trains with one sample a GPU and a step. Reports the median of the last steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.real_checkpoint import build
from benchmarks.report import add_arguments, report, table
from pipeline.recipe import to_toml

STEPS = 12
MEASURED = 6


def recipe(folder: Path, checkpoint: Path, videos: Path) -> Path:
    path = folder / "recipe.toml"
    values = {
        "model": {"path": str(checkpoint)},
        "data": {"datasets": {"clips": {"layout": "folder", "path": str(videos)}}},
        "encode": {
            "cache": str(folder / "cache"),
            "height": 432,
            "width": 768,
            "fps": "source",
            "executor": "local",
            "windows": {"mode": "uniform", "count": 24},
        },
        "train": {"steps": STEPS, "memory_limit_gib": 72, "track": {"tensorboard": False}},
    }
    path.write_text(to_toml(values))
    return path


def latentline(*arguments: str) -> None:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {result.returncode}")


def train(path: Path, gpus: int, **settings: object) -> dict[str, float]:
    """Train into a folder of its own; medians of the last steps."""
    output = Path(tempfile.mkdtemp(dir=path.parent))
    given = {"output": f'"{output}"', "batch_size": gpus, **settings}
    overrides = [part for name, value in given.items() for part in ("--set", f"train.{name}={value}")]
    latentline("train", str(path), "--gpus", str(gpus), *overrides)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][-MEASURED:]
    names = ("seconds_per_step", "samples_per_second", "data_wait_share", "tflops_per_device", "mfu")
    measured = {name: statistics.median(record[name] for record in records) for name in names}
    return measured | {"peak": max(record["peak_memory_bytes"] for record in records), "loss": records[-1]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--checkpoint", type=Path)
    add_arguments(parser)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="latentline-"))
    path = recipe(folder, build(options.checkpoint or folder / "checkpoint"), options.videos)
    latentline("encode", str(path))
    many = options.gpus
    runs = [
        ("1 GPU", 1, {}),
        (f"{many} GPUs, replicated", many, {"parallel": '"replicate"'}),
        (f"{many} GPUs, sharded, selective", many, {"parallel": '"shard"', "activation": '"selective"'}),
        (
            f"{many} GPUs, 2 a sample, selective",
            many,
            {"context_parallel": 2, "batch_size": many // 2, "activation": '"selective"'},
        ),
    ]
    lines = []
    single = None
    for name, gpus, settings in runs:
        got = train(path, gpus, **settings)
        rate = got["samples_per_second"] / gpus
        single = single or rate
        cells = [
            name,
            f"{got['seconds_per_step']:.3f}",
            f"{rate:.3f}",
            f"{rate / single:.3f}",
            f"{got['data_wait_share']:.2%}",
            f"{got['tflops_per_device']:.0f}",
            f"{got['mfu']:.3f}",
            f"{got['peak'] / 2**30:.1f}",
            f"{got['loss']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    columns = ["run", "s/step", "samples/s per GPU", "against 1 GPU", "data wait", "TFLOP/s", "MFU", "peak GiB", "loss"]
    report(
        options,
        "Training from real shards at 432x768x93 on several GPUs, LoRA r32, bfloat16",
        table(columns, lines),
        command=f"python -m benchmarks.scaling --videos FOLDER --gpus {many}",
        gpus=many,
    )


if __name__ == "__main__":
    main()
