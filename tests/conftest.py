"""Fixtures every package's tests share: the tiny checkpoint and a small dataset, built once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pipeline.demo.checkpoint import build_tiny_checkpoint
from pipeline.demo.transfer_checkpoint import build_tiny_transfer_checkpoint
from pipeline.demo.videos import make_videos

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of weights are remembered in the user's cache folder; tests leave that alone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Cosmos-Predict2.5 in diffusers format. Read-only: copy it to change it."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `videos/*.mp4` (4 of 64 x 96 pixels, 17 frames, 16 fps) and `metas/*.txt`. Read-only."""
    folder = tmp_path_factory.mktemp("dataset")
    make_videos(folder, num_videos=4, height=64, width=96, num_frames=17, fps=16.0)
    return folder


@pytest.fixture(scope="session")
def tiny_transfer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Cosmos-Transfer2.5 in diffusers format, its controlnet included. Read-only."""
    return build_tiny_transfer_checkpoint(tmp_path_factory.mktemp("transfer") / "tiny")
