"""Ranks do not outlive the command that started them, and two commands do not write to one folder."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests import jobs
from tests.pipeline.recipes import write_recipe
from tests.pipeline.test_launch import children, steps_done, the_error
from tests.train.caches import make_snapshot


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("abandoned")
    make_snapshot(folder / "cache", tiny_checkpoint)
    values = {
        "model": {"path": str(tiny_checkpoint)},
        "encode": {"cache": str(folder / "cache")},
        "train": {"steps": 100_000, "dtype": "float32", "lora": {"rank": 4}, "track": {"tensorboard": False}},
    }
    return write_recipe(folder, values)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_ranks_end_with_their_launcher_and_leave_a_checkpoint(recipe: Path, tmp_path: Path, number: int) -> None:
    process = jobs.start("train", recipe, "--gpus", "2", "--set", f'train.output="{tmp_path}"')
    jobs.wait_until(lambda: steps_done(tmp_path) > 2, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=60)  # the ranks have the other end of stderr as well
    jobs.wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    assert process.returncode == (75 if number == signal.SIGHUP else -signal.SIGKILL)
    assert "run the same command to continue" in the_error(err)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_second_run_into_the_folder_is_refused_and_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    options = ("--set", f'train.output="{tmp_path}"')
    process = jobs.start("train", recipe, *options)
    jobs.wait_until(lambda: steps_done(tmp_path) > 0, process)
    kept = (tmp_path / "recipe.toml").read_bytes()
    done = jobs.run("train", recipe, *options, "--set", "train.steps=7")
    assert done.returncode == 2
    assert f"process {process.pid} on " in the_error(done.stderr)
    assert (tmp_path / "recipe.toml").read_bytes() == kept
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[1].count("run the same command to continue") == 1
    assert process.returncode == 75
