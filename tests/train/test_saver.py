"""Saving beside the training: the same files, one at a time, and errors that surface."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from manifests.config import ModelConfig
from manifests.errors import LatentlineError
from manifests.store import Store
from tests.train.caches import make_snapshot
from train import checkpoint
from train.checkpoint import Progress, State, Weights
from train.config import TrainConfig
from train.saver import Saver
from train.trainer import train


def state(value):
    tensors = {"a.weight": torch.full((3,), float(value))}
    return State(Weights(None, {}, tensors), None, {"a.weight/exp_avg": torch.zeros(3)})


def saver(folder, told=None, background=True):
    def on_checkpoint(step, path):
        told.append((step, path.name))

    return Saver(folder, {}, keep_last=2, background=background, on_checkpoint=None if told is None else on_checkpoint)


@pytest.mark.parametrize("background", [True, False])
def test_every_checkpoint_is_written_and_told_in_order(tmp_path, background):
    told = []
    with saver(tmp_path, told, background) as running:
        for step in (1, 2, 3):
            running.save(Progress(step, step), state(step))
    assert told == [(step, f"step_{step:08d}") for step in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert checkpoint.latest_good(tmp_path) == tmp_path / "step_00000003"


def test_one_is_in_flight_at_most(tmp_path, monkeypatch):
    """The second save waits for the first; `write` itself is held up until then."""
    original = checkpoint.write
    begun, go_on, running_now, most = threading.Event(), threading.Event(), [], []

    def held_up(folder, progress, *arguments, **options):
        running_now.append(progress.step)
        most.append(len(running_now))
        begun.set()
        assert go_on.wait(30)
        try:
            return original(folder, progress, *arguments, **options)
        finally:
            running_now.remove(progress.step)

    monkeypatch.setattr(checkpoint, "write", held_up)
    with saver(tmp_path) as running:
        running.save(Progress(1, 1), state(1))
        assert begun.wait(30)
        assert checkpoint.latest_good(tmp_path) is None  # the training went on while it was not written
        threading.Timer(0.05, go_on.set).start()
        running.save(Progress(2, 2), state(2))
    assert most == [1, 1]


def test_an_error_of_the_thread_is_raised_at_the_next_save_and_at_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    running = saver(tmp_path / "file")
    running.save(Progress(1, 1), state(1))
    with pytest.raises(LatentlineError, match="cannot be written"):
        running.save(Progress(2, 2), state(2))
    running.save(Progress(3, 3), state(3))
    with pytest.raises(LatentlineError, match="cannot be written"):
        running.__exit__(None, None, None)


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_thread(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    running = saver(tmp_path / "file")
    running.save(Progress(1, 1), state(1))
    running.__exit__(KeyError, KeyError(), None)
    assert "cannot be written" in caplog.text


def test_a_run_that_saves_beside_training_leaves_the_same_checkpoints(tmp_path, tiny_checkpoint):
    """The state is a copy: later steps do not reach into what is being written."""
    snapshot = make_snapshot(tmp_path / "cache", tiny_checkpoint)
    model, store = ModelConfig(path=str(tiny_checkpoint)), Store(str(tmp_path / "cache"))
    for name, background in (("now", False), ("later", True)):
        settings = {"output": str(tmp_path / name), "steps": 4, "dtype": "float32", "method": "full", "keep_last": 9}
        settings |= {"checkpoint_every": 1, "async_save": background, "ema": {"kind": "power"}}
        train(model, TrainConfig(**settings, track={"tensorboard": False}), snapshot, store)
    for step in (1, 2, 3, 4):
        folders = [checkpoint.at_step(tmp_path / name / "checkpoints", step) for name in ("now", "later")]
        for file in ("trained_weights.safetensors", "optimizer.safetensors", "ema.safetensors"):
            first, second = (load_file(folder / file) for folder in folders)
            assert first.keys() == second.keys()
            assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
