"""What the tests of jobs compare with, and places where commands run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.image_context import IMAGE
from pipeline.encode_stage import encode_stage
from pipeline.recipe import Recipe
from tests import jobs
from tests.pipeline.places import Place
from tests.pipeline.recipes import recipe_values
from tests.pipeline.transfer import transfer_recipe


@dataclass(frozen=True)
class Reference:
    """A job that nothing disturbed. tars: digest by shard. samples: of its snapshot."""

    snapshot: str
    tars: dict[str, str]
    samples: list[dict[str, Any]]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, demo_dataset: Path) -> Reference:
    """`jobs.write_job`'s job, encoded by one local process."""
    recipe = jobs.write_job(tmp_path_factory.mktemp("reference"), tiny_checkpoint, demo_dataset)
    result = jobs.encode(recipe)
    cache = result["cache"]
    return Reference(result["snapshot"], jobs.committed(cache), jobs.samples(cache))


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path) -> Place:
    shutil.copytree(demo_dataset, tmp_path / "data")
    return Place(tmp_path, recipe_values(tmp_path, tiny_checkpoint, tmp_path / "data"))


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, demo_dataset: Path) -> Place:
    """A place where `encode` has run. Read-only: give `train.output` and the like elsewhere."""
    root = tmp_path_factory.mktemp("encoded")
    place = Place(root, recipe_values(root, tiny_checkpoint, demo_dataset))
    jobs.encode(place.recipe)
    return place


@pytest.fixture(scope="session")
def transfer(tmp_path_factory: pytest.TempPathFactory, tiny_transfer: Path, demo_dataset: Path) -> Recipe:
    """A recipe of Transfer with hints, encoded. Read-only: give `train.output` and the like elsewhere."""
    recipe = transfer_recipe(tmp_path_factory.mktemp("transfer-parity"), tiny_transfer, demo_dataset)
    _, code = encode_stage(recipe)
    assert code == 0
    return recipe


@pytest.fixture(scope="session")
def with_images(transfer: Recipe, tmp_path_factory: pytest.TempPathFactory, demo_dataset: Path) -> Recipe:
    """The same, with an image context of each video."""
    folder = tmp_path_factory.mktemp("images")
    shutil.copytree(transfer.encode.cache, folder / "cache")
    (folder / IMAGE).mkdir()
    rng = np.random.default_rng(0)
    for video in (demo_dataset / "videos").glob("*.mp4"):
        np.save(folder / IMAGE / f"{video.stem}.npy", rng.normal(scale=4, size=(4, 24)).astype(np.float32))
    dataset = replace(transfer.data.datasets["shapes"], hints_path=str(folder))
    recipe = replace(
        transfer,
        data=replace(transfer.data, datasets={"shapes": dataset}),
        encode=replace(
            transfer.encode, cache=str(folder / "cache"), hints=replace(transfer.encode.hints, image_context="given")
        ),
        train=replace(transfer.train, output=str(folder / "run")),
    )
    result, code = encode_stage(recipe)
    assert code == 0
    assert result["encoded"]["hint"] == 4
    return recipe
