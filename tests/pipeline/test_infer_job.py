"""`latentline infer` as a command: over several ranks, killed and run again, and what it exits with."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from infer.video import read_frames
from manifests.errors import LatentlineError
from pipeline.recipe import load_recipe
from pipeline.stages import infer_stage
from tests import jobs
from tests.pipeline.recipes import recipe_values, write_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, demo_dataset: Path) -> Path:
    return write_recipe(tmp_path, recipe_values(tmp_path, tiny_checkpoint, demo_dataset))


def write_inputs(folder: Path, count: int, **common: Any) -> Path:
    """Requests v0, v1, ..., and one that fails."""
    (folder / "bad.png").write_bytes(b"no image")
    path = folder / "in.json"
    samples = {f"v{index}": {"prompt": f"circle {index}"} for index in range(count)}
    bad = {"prompt": "p", "input_path": "bad.png"}
    path.write_text(json.dumps({**common, "samples": {"bad": bad, **samples}}))
    return path


def complete(folder: Path) -> list[str]:
    """Names of the videos that are there; all of them can be read to the end."""
    names = []
    for path in sorted(folder.glob("*.mp4")):
        try:
            assert len(read_frames(path)) == 9
        except LatentlineError:
            pytest.fail(f"{path} is torn")
        names.append(path.stem)
    return names


def test_a_folder_over_two_ranks_is_killed_and_finished_by_the_same_command(recipe: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, 12, num_steps=20)
    command = ("infer", recipe, inputs, "--gpus", "2", "--no-guardrail", "--json")
    videos = tmp_path / "videos"
    process = jobs.start(*command)
    jobs.wait_until(lambda: len(list(videos.glob("v*.mp4"))) > 1, process)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in [process.pid, *ranks]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    before = {name: (videos / f"{name}.mp4").stat().st_mtime_ns for name in complete(videos)}
    assert 1 < len(before) < 12

    (videos / ".v11.mp4.1.part").write_bytes(b"torn")  # what a kill in the middle of writing leaves
    done = jobs.run(*command)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert not any(path.name.endswith(".part") for path in videos.iterdir())
    result = json.loads(done.stdout)
    assert result["kept"] == len(before)
    assert ["bad.png: cannot read this image" in line for line in result["failed"]] == [True]
    assert len(complete(videos)) == len(result["videos"]) == 12
    assert {name: (videos / f"{name}.mp4").stat().st_mtime_ns for name in before} == before
    records = json.loads((videos / "results.json").read_text())
    assert records["ranks"] == 2
    assert [record["name"] for record in records["videos"]] == ["bad", *(f"v{index}" for index in range(12))]
    assert {r["name"] for r in records["videos"] if r["status"] == "kept"} == set(before)
    assert (videos / "contact_sheet.png").exists()
    assert (videos / "recipe.toml").exists()


def test_some_that_fail_exit_3_and_all_exit_1(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(recipe))
    result, code = infer_stage(loaded, str(write_inputs(tmp_path, 1)), guardrail=False)
    assert (code, [path.name for path in result["videos"]]) == (3, ["v0.mp4"])
    result, code = infer_stage(loaded, str(write_inputs(tmp_path, 0)), guardrail=False)
    assert (code, result["videos"]) == (1, [])
    assert "bad.png: cannot read this image" in result["failed"][0]
