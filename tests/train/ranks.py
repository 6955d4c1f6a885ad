"""A rank that trains, for `tests.ranks`.

A job is {"world", "model": path, "cache": path, "train": {...}, "stop_at": step}; with `stop_at` the main rank gets a
SIGTERM once that step's checkpoint is written. Into the job's output folder go `outcomes`, a line a job that says how
it ended, `held` and `trained`, how many frozen and trained values rank 0 holds, and where ranks share samples
`compiled`, how far a compiled block is from an eager one.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from manifests.config import ModelConfig
from manifests.errors import Preempted
from manifests.snapshot import load_snapshot
from manifests.store import Store
from train import cosmos25, parallel
from train.activation import set_levels
from train.config import TrainConfig
from train.context_parallel import sharing
from train.model import build
from train.trainer import train


def run(job: dict) -> str:
    store = Store(job["cache"])

    def on_checkpoint(step: int, folder: Path) -> None:
        if step == job.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(
            ModelConfig(path=job["model"]),
            TrainConfig(**job["train"]),
            load_snapshot(store, "train"),
            store,
            on_checkpoint=on_checkpoint,
        )
    except Preempted:
        return "preempted"
    return "done"


def held_values(job: dict, ranks: parallel.Ranks) -> tuple[int, int]:
    model = ModelConfig(path=job["model"])
    snapshot = load_snapshot(Store(job["cache"]), "train")
    transformer = build(model, TrainConfig(**job["train"]), cosmos25, ranks, snapshot).transformer
    held = {False: 0, True: 0}
    for parameter in transformer.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held[parameter.requires_grad] += local.numel()
    return held[False], held[True]


def compiled_distance(job: dict, ranks: parallel.Ranks) -> float:
    """Compile a block that computes this rank's tokens, as one graph; compare its output and gradients with eager's."""
    model = ModelConfig(path=job["model"])
    snapshot = load_snapshot(Store(job["cache"]), "train")
    config = TrainConfig(**job["train"])
    transformer = build(model, config, cosmos25, ranks, snapshot).transformer
    block = cosmos25.blocks(transformer)[1]
    set_levels([block], ["attention"], compiled=False)
    with parallel.join(config.context_parallel) as shared, sharing(shared.context):
        # One sample: swapped with its tokens it is the same memory, which PyTorch 2.11 compiled wrongly once.
        inputs = cosmos25.block_inputs(transformer, (1, *next(iter(snapshot.shapes))), 8, ranks.device)
        found = []
        for run in (block, torch.compile(block.forward, fullgraph=True, backend="aot_eager")):
            block.zero_grad()
            inputs[0].grad = None
            output = run(*inputs)
            output.square().mean().backward()
            gradients = [p.grad for p in block.parameters() if p.requires_grad] + [inputs[0].grad]
            found.append(torch.cat([tensor.detach().flatten() for tensor in (output, *gradients)]))
    return float((found[1] - found[0]).norm() / found[0].norm())


def run_rank(job: dict, index: int, rank: int) -> None:
    with parallel.join() as ranks:
        outcome = run(job)
        held, trained = held_values(job, ranks)
        found = {"held": str(held), "trained": str(trained)}
        if job.get("compile"):
            found["compiled"] = str(compiled_distance(job, ranks))
        if ranks.is_main:
            output = Path(job["train"]["output"])
            for name, value in found.items():
                (output / name).write_text(value)
            with (output / "outcomes").open("a") as outcomes:
                outcomes.write(f"{outcome}\n")
