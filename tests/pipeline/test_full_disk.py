"""A disk that fills up is one line, wherever a command meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.errors import LatentlineError
from tests.command import latentline
from tests.infer.conftest import pipe, save_adapter
from tests.small_files import small_files
from train.config import TrackConfig
from train.metrics import METRICS_NAME, Metrics

__all__ = ["pipe", "save_adapter"]


@pytest.mark.parametrize(("to", "name"), [("peft", "folder"), ("nvidia", "a.pt"), ("comfyui", "a.safetensors")])
def test_export(save_adapter, tmp_path: Path, to: str, name: str) -> None:
    output = tmp_path / "out" / name
    source = save_adapter()
    with small_files(200):
        outcome = latentline("export", source, "--to", to, "--output", output)
    assert outcome.code == 1
    assert "File too large" in outcome.error()
    assert name in outcome.error()
    assert not any(output.parent.iterdir())


def test_metrics(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, TrackConfig(tensorboard=False), done=0, settings={})
    metrics.record({"step": 1, "loss": 0.5})
    with small_files(30), pytest.raises(LatentlineError, match=rf"{METRICS_NAME}: cannot be written: File too large"):
        metrics.record({"step": 2, "loss": 0.5})
    metrics.close()


def test_a_folder_that_cannot_be_made(save_adapter, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = latentline("export", save_adapter(), "--to", "peft", "--output", tmp_path / "file" / "folder")
    assert outcome.code == 2
    assert "file cannot be made" in outcome.error()


def test_a_folder_nobody_may_write_to() -> None:
    outcome = latentline("demo", "--output", "/sys/latentline")
    assert outcome.code == 1
    assert "/sys/latentline" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
