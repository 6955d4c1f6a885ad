"""The main job at real size on one GPU, with random weights: encode real MP4s, five LoRA steps, a short inference.

    python -m benchmarks.real_size --videos FOLDER [--checkpoint FOLDER] [--only encode] [--output FILE]

FOLDER holds `videos/*.mp4` and `metas/*.txt`. Prints a Markdown table of times and peak memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_checkpoint import build
from infer.config import AdapterConfig
from pipeline.encode_stage import encode_stage
from pipeline.recipe import Recipe, validate
from pipeline.stages import infer_stage, train_stage


def measured(rows: list[list[str]], name: str, call: Callable[[], Any], note: Callable[[Any], str]) -> Any:
    """Run a part, and append its wall time and the peak memory of the GPU allocator."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    rows.append([name, f"{time.monotonic() - begin:.1f} s", f"{peak:.1f} GiB", note(result)])
    print(*rows[-1], sep=" | ", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--only", choices=["encode"], help="leave training and inference out")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default="unknown", help="of this repository, for the table")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="latentline-"))
    rows: list[list[str]] = []
    checkpoint = options.checkpoint or work / "checkpoint"
    measured(rows, "build the random checkpoint", lambda: build(checkpoint), lambda _: "not part of the job")
    recipe = validate(
        {
            "model": {"path": str(checkpoint)},
            "data": {"datasets": {"clips": {"layout": "folder", "path": str(options.videos)}}},
            "encode": {
                "cache": str(work / "cache"),
                "height": 432,
                "width": 768,
                "num_frames": 93,
                "fps": "source",
                "executor": "local",
                "windows": {"mode": "uniform", "count": 24},
            },
            "train": {"output": str(work / "run"), "steps": 5, "memory_limit_gib": 72, "track": {"tensorboard": False}},
            "infer": {"output": str(work / "videos"), "height": 432, "width": 768, "num_steps": 4},
        },
        "benchmark",
    )
    measured(rows, "encode", lambda: encode_stage(recipe)[0], _encoded)
    measured(rows, "encode again", lambda: encode_stage(recipe)[0], _encoded)
    if options.only is None:
        _train_and_infer(rows, recipe, work)
    table = _table(rows, options.commit)
    print(table)
    if options.output:
        options.output.write_text(table)


def _train_and_infer(rows: list[list[str]], recipe: Recipe, work: Path) -> None:
    measured(rows, "train, 5 steps of LoRA r32 within 72 GiB", lambda: train_stage(recipe), _step_times)
    adapter = AdapterConfig(path=str(work / "run" / "adapter"))
    adapted = replace(recipe, infer=replace(recipe.infer, adapters={"trained": adapter}))
    measured(
        rows,
        "infer, text2world, 4 steps with guidance",
        lambda: infer_stage(adapted, "A car drives on a freeway.", guardrail=False)[0],
        lambda r: f"{len(r['videos'])} video, with the adapter",
    )


def _encoded(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in result["encoded"].items())
    speed = {name: result[name] for name in ("windows_per_second", "decode_wait_share") if result.get(name) is not None}
    return "; ".join([counts, *(f"{name.replace('_', ' ')} {value}" for name, value in speed.items())])


def _step_times(result: dict[str, Any]) -> str:
    lines = (Path(result["adapter"]).parent.parent / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    times = ", ".join(f"{record['seconds_per_step']:.2f}" for record in records)
    return f"s/step: {times}; losses {records[0]['loss']:.3f} to {records[-1]['loss']:.3f}"


def _table(rows: list[list[str]], commit: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    head = f"{torch.cuda.get_device_name()}, {packages}, {date.today()}, commit {commit}"
    lines = [head, "", "| part | wall time | peak memory | notes |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    main()
