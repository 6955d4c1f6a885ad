"""Which folders count as checkpoints, and which of them stay."""

import shutil

import pytest
import torch

from train import checkpoint
from train.checkpoint import Progress, State, Weights


def save(folder, step, *, keep_last):
    state = State(Weights(None, {}, {"weight": torch.ones(2)}), None, {"weight/step": torch.tensor(float(step))})
    return checkpoint.write(folder, Progress(step, step), state, {}, keep_last=keep_last)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep_last", [1, 2])
def test_torn_checkpoints_do_not_push_out_good_ones(tmp_path, keep_last):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    for step in (20, 30):
        (checkpoint.at_step(tmp_path, step) / "optimizer.safetensors").write_bytes(b"torn")
    assert checkpoint.latest_good(tmp_path) == checkpoint.at_step(tmp_path, 10)
    save(tmp_path, 15, keep_last=keep_last)
    assert checkpoint.latest_good(tmp_path) == checkpoint.at_step(tmp_path, 15)
    assert checkpoint.at_step(tmp_path, 10).exists() == (keep_last == 2)
    save(tmp_path, 20, keep_last=keep_last)
    assert checkpoint.latest_good(tmp_path) == checkpoint.at_step(tmp_path, 20)
    save(tmp_path, 40, keep_last=keep_last)
    assert names(tmp_path) == ["step_00000020", "step_00000030", "step_00000040"][-keep_last:]


def test_a_copy_put_aside_is_no_checkpoint_and_stays(tmp_path):
    path = save(tmp_path, 10, keep_last=1)
    shutil.copytree(path, tmp_path / "step_00000010.bak")
    (tmp_path / "step_old").mkdir()
    assert checkpoint.latest_good(tmp_path) == path
    save(tmp_path, 20, keep_last=1)
    assert names(tmp_path) == ["step_00000010.bak", "step_00000020", "step_old"]
