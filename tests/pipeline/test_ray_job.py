"""`ray job submit` to a real head: the cluster is joined, a killed encoder replaced, the result a local run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.pipeline.conftest import Reference
from tests.services import RayHead, ray_head

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with tempfile.TemporaryDirectory(prefix="ll-") as folder, ray_head(Path(folder)) as head:
        yield head  # in a short path: the names of Ray's sockets are limited to 107 bytes


def _submit(head: RayHead, folder: Path, *entrypoint: str) -> subprocess.Popen[str]:
    """`ray job submit`, which follows the job and exits as it does."""
    command = [RAY, "job", "submit", f"--address={head.dashboard}", "--working-dir=.", "--", *entrypoint]
    return subprocess.Popen(
        command, env=head.environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _events(cache: Path, name: str) -> list[dict[str, Any]]:
    lines = [line for path in cache.glob("events/*/*.jsonl") for line in path.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == name]


def _metrics(head: RayHead) -> str:
    """What the head's agents offer to Prometheus."""
    targets = json.loads((head.folder / "prom_metrics_service_discovery.json").read_text())
    addresses = [address for target in targets for address in target["targets"]]
    return "".join(urllib.request.urlopen(f"http://{address}/metrics").read().decode() for address in addresses)


def test_a_submitted_job_survives_a_killed_encoder(
    head: RayHead, tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path, reference: Reference
) -> None:
    recipe = jobs.write_job(tmp_path, tiny_checkpoint, demo_dataset)
    cache = tmp_path / "cache"
    submitted = tmp_path / "working_dir"
    submitted.mkdir()
    recipe.rename(submitted / recipe.name)
    job = _submit(head, submitted, "latentline", "encode", recipe.name, "--executor", "ray")
    [first] = jobs.wait_until(lambda: _events(cache, "encoder"), job)
    jobs.wait_until(lambda: jobs.num_committed(cache, "latents"), job)
    os.kill(first["pid"], signal.SIGKILL)
    jobs.wait_until(lambda: "latentline_entries_encoded" in _metrics(head), job)
    out, _ = job.communicate(timeout=180)
    assert job.returncode == 0, out
    assert reference.snapshot in out
    assert "died, its" in out
    assert jobs.committed(cache) == reference.tars
    assert jobs.samples(cache) == reference.samples


def test_a_submitted_job_that_cannot_start_fails_in_one_line(
    head: RayHead, tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path
) -> None:
    jobs.write_job(tmp_path, tiny_checkpoint, demo_dataset, height=30)
    job = _submit(head, tmp_path, "latentline", "encode", "recipe.toml")
    out, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "error: encode.height" in out
    assert "Traceback" not in out
