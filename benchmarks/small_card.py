"""A card of 24 GB, made of a larger one: the process may fill 22 GiB and no more.

    python -m benchmarks.small_card [--cap-gib 22] [--commit REV] [--output FILE]

Trains LoRA of rank 32 through the function that `latentline train` calls, each case in a process of its own: one that
fits, and two that do not, whose message is shown: activation = none at 432x768x93, and full at 704x1280x93. The cap is
PyTorch's own and counts all that its allocator holds, so an excess is a real out-of-memory error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_job import latent_shape, make_job, recipe_of, records_of, seconds_per_step
from benchmarks.report import add_arguments, bullets, report, table
from manifests.errors import LatentlineError
from pipeline.stages import train_stage

SIZES = {"432x768x93": (432, 768), "704x1280x93": (704, 1280)}
CASES = (("432x768x93", "auto", 6), ("432x768x93", "none", 2), ("704x1280x93", "full", 2))


def run_case(folder: Path, size: str, activation: str, steps: int, cap_gib: float, tiny: bool) -> dict[str, Any]:
    """Train under the cap: peak memory and time, or the error."""
    if not tiny:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gib * 2**30 / total)
    checkpoint, cache = make_job(folder, shape=latent_shape(*SIZES[size]), samples=4, tiny=tiny)
    output = Path(tempfile.mkdtemp(dir=folder))
    recipe = recipe_of(checkpoint, cache, output, steps=steps, activation=activation)
    try:
        train_stage(recipe)
    except LatentlineError as error:
        return {"error": str(error)}
    records = records_of(output)
    return {
        "seconds": seconds_per_step(records, max(1, steps - 2)),
        "allocated": records[-1].get("peak_memory_bytes", 0) / 2**30,
        "reserved": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0,
        "losses": [record["loss"] for record in records],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cap-gib", type=float, default=22.0)
    parser.add_argument("--tiny", action="store_true", help="try the script with the demo's model; no numbers")
    parser.add_argument("--case", type=int, help="run this one, in --folder, and print what came of it")
    parser.add_argument("--folder", type=Path, help="where the job is, or is made and left")
    parser.add_argument("--at-once", action="store_true", help="all cases side by side; their times then say nothing")
    add_arguments(parser)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(options.folder, *CASES[options.case], options.cap_gib, options.tiny)))
        return
    with tempfile.TemporaryDirectory(prefix="latentline-") as temporary:
        folder = options.folder or Path(temporary)
        for size in dict.fromkeys(size for size, _, _ in CASES):
            make_job(folder, shape=latent_shape(*SIZES[size]), samples=4, tiny=options.tiny)
        given = ["--folder", str(folder), "--cap-gib", str(options.cap_gib), *(["--tiny"] if options.tiny else [])]

        def case(index: int) -> dict[str, Any]:
            command = [sys.executable, "-m", "benchmarks.small_card", "--case", str(index), *given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            told = json.loads(done.stdout.splitlines()[-1])
            print(*CASES[index], told, flush=True)
            return told

        with ThreadPoolExecutor(len(CASES) if options.at_once else 1) as pool:
            rows = [(*CASES[index], told) for index, told in enumerate(pool.map(case, range(len(CASES))))]
    lines = []
    for size, activation, _, told in rows:
        if "error" in told:
            lines.append(f"| {size} | {activation} | out of memory | | |")
        else:
            seconds = "-" if options.at_once else f"{told['seconds']:.3f}"
            numbers = f"{seconds} | {told['allocated']:.1f} | {told['reserved']:.1f}"
            lines.append(f"| {size} | {activation} | {numbers} |")
    errors = [f"{size}, {activation}: `{told['error']}`" for size, activation, _, told in rows if "error" in told]
    report(
        options,
        f"LoRA r32 within {options.cap_gib:g} GiB",
        table(["size", "activation", "s/step", "peak allocated GiB", "held by the allocator GiB"], lines),
        bullets(errors),
        command=f"python -m benchmarks.small_card{' --at-once' if options.at_once else ''}",
        limits=f" held to {options.cap_gib:g} GiB",
    )


if __name__ == "__main__":
    main()
