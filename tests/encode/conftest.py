"""A small job for each test that wants one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.encode.small_job import Job


@pytest.fixture
def job(tmp_path: Path, tiny_checkpoint: Path) -> Job:
    return Job(tmp_path, tiny_checkpoint)
