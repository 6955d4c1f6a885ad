"""A small real recipe over the tiny checkpoint and dataset, for tests of the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe, to_toml, validate


def recipe_values(folder: Path, checkpoint: Path, dataset: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(checkpoint)},
        "data": {"datasets": {"shapes": {"layout": "folder", "path": str(dataset)}}},
        "encode": {
            "cache": str(folder / "cache"),
            "height": 32,
            "width": 48,
            "num_frames": 9,
            "fps": 16,
            "dtype": "float32",
            "executor": "local",
            "windows": {"mode": "uniform", "count": 2},
        },
        "train": {
            "output": str(folder / "run"),
            "steps": 4,
            "batch_size": 2,
            "dtype": "float32",
            "activation": "none",
            "lora": {"rank": 4, "alpha": 8},
            "optimizer": {"lr": 1e-2},
            "track": {"tensorboard": False},
        },
        "infer": {
            "output": str(folder / "videos"),
            "height": 32,
            "width": 48,
            "num_frames": 9,
            "num_steps": 2,
            "guidance": 3,
            "dtype": "float32",
        },
    }


def make_recipe(folder: Path, checkpoint: Path, dataset: Path) -> Recipe:
    return validate(recipe_values(folder, checkpoint, dataset), "test")


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(to_toml(values))
    return path
