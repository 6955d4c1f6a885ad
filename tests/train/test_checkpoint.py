import json
import logging
import resource
import shutil
import signal

import pytest
import torch

from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError
from tests.train.test_cosmos25 import make_batch
from train import checkpoint, cosmos25
from train.adapters import adapter_parameters, add_adapter
from train.checkpoint import Progress
from train.config import LoraConfig, ObjectiveConfig, ScheduleConfig, TrainConfig


@pytest.fixture
def state(tiny_checkpoint):
    """A transformer and an optimizer after `steps` real steps."""

    def make(steps):
        transformer = cosmos25.load_transformer(ModelConfig(path=str(tiny_checkpoint)), torch.float32)
        add_adapter(transformer, "dora", LoraConfig(rank=4), cosmos25.DEFAULT_TARGETS)
        optimizer = torch.optim.AdamW(adapter_parameters(transformer).values(), lr=1e-2)
        for _ in range(steps):
            advance(transformer, optimizer)
        return transformer, optimizer

    return make


def advance(transformer, optimizer):
    cosmos25.loss(transformer, make_batch(), ObjectiveConfig()).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, progress, transformer, optimizer, settings, *, keep_last):
    state = checkpoint.collect(transformer, optimizer)
    return checkpoint.write(folder, progress, state, settings, keep_last=keep_last)


def settings(**changes):
    config = TrainConfig(output="unused", **changes)
    return checkpoint.fixed_settings(config, snapshot_hash="s", base_digest="b")


def test_a_loaded_checkpoint_continues_bit_by_bit(state, tmp_path):
    transformer, optimizer = state(2)
    path = save(tmp_path, Progress(2, 8), transformer, optimizer, settings(), keep_last=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    again, again_optimizer = state(0)
    assert checkpoint.load(path, again, again_optimizer, settings()) == Progress(2, 8)
    advance(transformer, optimizer)
    advance(again, again_optimizer)
    for name, parameter in adapter_parameters(transformer).items():
        assert torch.equal(parameter, adapter_parameters(again)[name]), name


@pytest.mark.parametrize("name", ["optimizer.safetensors", "pytorch_lora_weights.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_torn_checkpoint_is_skipped_with_a_note(state, tmp_path, caplog, name, damage):
    transformer, optimizer = state(1)
    for step in (1, 2):
        save(tmp_path, Progress(step, step), transformer, optimizer, settings(), keep_last=3)
    victim = checkpoint.at_step(tmp_path, 2) / name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data if damage == "flip" else data[:-5])
    if damage == "remove":
        victim.unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_good(tmp_path) == checkpoint.at_step(tmp_path, 1)
    assert name in caplog.text
    assert "step_00000002" in caplog.text


def test_a_write_that_was_killed_leaves_nothing_that_counts(state, tmp_path):
    transformer, optimizer = state(1)
    path = save(tmp_path, Progress(1, 1), transformer, optimizer, settings(), keep_last=3)
    shutil.copytree(path, tmp_path / ".building-123")
    (path / "complete.json").unlink()
    assert checkpoint.latest_good(tmp_path) is None
    save(tmp_path, Progress(1, 1), transformer, optimizer, settings(), keep_last=3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoint.latest_good(tmp_path) == path


def test_no_more_than_keep_last_are_kept(state, tmp_path):
    transformer, optimizer = state(1)
    for step in (8, 9, 10, 11):
        save(tmp_path, Progress(step, step), transformer, optimizer, settings(), keep_last=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000010", "step_00000011"]


def test_changed_settings_are_all_named(state, tmp_path):
    transformer, optimizer = state(1)
    path = save(tmp_path, Progress(1, 1), transformer, optimizer, settings(), keep_last=1)
    other = settings(seed=3, batch_size=2, method="dora", lora=LoraConfig(rank=8, targets=("to_q",)))
    with pytest.raises(UsageError) as caught:
        checkpoint.load(path, transformer, optimizer, other)
    for name in (
        "train.seed",
        "train.batch_size",
        "train.method",
        "train.lora.rank (was 32, now 8)",
        "train.lora.targets",
    ):
        assert name in str(caught.value)
    assert "train.lora.alpha" not in str(caught.value)
    assert "train.snapshot" not in str(caught.value)


def test_of_other_data_the_message_says_how_to_go_on_with_the_old(state, tmp_path):
    transformer, optimizer = state(1)
    before = settings()
    path = save(tmp_path, Progress(1, 1), transformer, optimizer, before, keep_last=1)
    with pytest.raises(UsageError, match=f"train.snapshot={before['snapshot']}, or choose another"):
        checkpoint.load(path, transformer, optimizer, before | {"snapshot": "another"})


def test_what_does_not_change_the_training_is_free():
    free = {"steps": 5, "micro_batch_size": 2, "activation": "none", "parallel": "shard", "loader_threads": 1}
    assert settings(**free, keep_last=9, checkpoint_every=7) == settings()
    cosine = ScheduleConfig(kind="cosine")
    assert settings(schedule=cosine, steps=5) != settings(schedule=cosine, steps=6)


def test_a_newer_layout_is_refused(state, tmp_path):
    transformer, optimizer = state(1)
    path = save(tmp_path, Progress(1, 1), transformer, optimizer, settings(), keep_last=1)
    document = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(document | {"layout": checkpoint.LAYOUT_VERSION + 1}))
    with pytest.raises(UsageError, match="newer"):
        checkpoint.load(path, transformer, optimizer, settings())


def test_a_disk_that_cannot_be_written_is_an_error_and_keeps_the_last_checkpoint(state, tmp_path):
    transformer, optimizer = state(1)
    path = save(tmp_path, Progress(1, 1), transformer, optimizer, settings(), keep_last=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(LatentlineError, match=r"step_00000002.*cannot be written"):
            save(tmp_path, Progress(2, 2), transformer, optimizer, settings(), keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.latest_good(tmp_path) == path
    assert list(tmp_path.iterdir()) == [path]
