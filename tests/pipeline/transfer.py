"""Recipes that train a controlnet on the tiny Transfer checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe, validate
from tests.pipeline.recipes import recipe_values

STEPS = 4


def transfer_recipe(folder: Path, checkpoint: Path, dataset: Path, **train: Any) -> Recipe:
    values = recipe_values(folder, checkpoint, dataset)
    values["model"]["family"] = "cosmos-transfer2.5"
    values["encode"] |= {"resize": "pad", "hints": {"kinds": ["edge", "vis"], "variants": 2}, "height": 48}
    values["train"] |= {
        "method": "control", "steps": STEPS, "hints": {"edge": 1, "vis": 2}, "optimizer": {"lr": 1e-3},
        "objective": {
            "conditioning": {"0": 0.4, "1": 0.4, "2": 0.2}, "conditioning_timestep": 0.1, "text_dropout": 0.5,
        },
        **train,
    }  # fmt: skip
    return validate(values, "test")


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]
