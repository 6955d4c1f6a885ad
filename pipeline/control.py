"""What a control run leaves beside its adapter: the controlnet as stock diffusers loads it, and what it follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manifests.family import find_family
from manifests.hints import write_kinds
from manifests.snapshot import Snapshot
from pipeline.recipe import Recipe
from train.hints import hint_weights, uses_hints
from train.model import DTYPES
from train.run import ADAPTER_FOLDER, EMA_FOLDER
from train.trained import TRAINED_NAME


def write_control(recipe: Recipe, snapshot: Snapshot) -> dict[str, Any]:
    """Of a model with hints: say which kinds it was trained on, and write its controlnet as stock diffusers loads it.

    The average of the weights, where the run keeps one, becomes `controlnet-ema`. A controlnet with LoRA in it stays in
    the adapter's files.
    """
    family = find_family("train", recipe.model)
    if not uses_hints(family):
        return {}
    config, output = recipe.train, Path(recipe.train.output)
    kinds = sorted(hint_weights(config, snapshot))
    folders = {"controlnet": output / ADAPTER_FOLDER}
    if config.ema.kind != "none":
        folders["controlnet-ema"] = output / EMA_FOLDER
    for folder in folders.values():
        write_kinds(folder, kinds)
    lora_inside = {"lora", "dora"} & set(config.methods) and config.lora.branch != "base"
    if "control" not in config.methods or lora_inside or "adapters" in config.methods:
        return {"hints": kinds}
    dtype = DTYPES[config.dtype]
    for name, folder in folders.items():
        family.export_controlnet(recipe.model, folder / TRAINED_NAME, output / name, kinds, dtype)
    return {"hints": kinds, "controlnet": output / "controlnet"}
