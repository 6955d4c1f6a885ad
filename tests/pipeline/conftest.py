"""What the tests of jobs compare with, and places where commands run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.pipeline.places import Place
from tests.pipeline.recipes import recipe_values


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
