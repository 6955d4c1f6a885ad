"""A video whose frames refer to each other, and a small job for each test that wants one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.encode.small_job import Job
from tests.encode.video_files import B_FRAMES, NUM_FRAMES, write_video


@pytest.fixture
def job(tmp_path: Path, tiny_checkpoint: Path) -> Job:
    return Job(tmp_path, tiny_checkpoint)


@pytest.fixture(scope="session")
def b_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "b-frames.mp4", NUM_FRAMES, **B_FRAMES)
