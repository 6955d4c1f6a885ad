"""What the tests of jobs compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import jobs


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
