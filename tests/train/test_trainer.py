import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from diffusers import CosmosTransformer3DModel

from manifests.config import ModelConfig
from manifests.errors import LatentlineError, Preempted, StaleCacheError, UsageError
from manifests.store import Store
from tests.train.caches import SHAPE, distance, make_snapshot
from train.adapters import load_adapter, read_adapter
from train.config import LoraConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from train.metrics import read_metrics
from train.trainer import train

OTHER = (16, 4, 6, 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_checkpoint):
    """A model, a snapshot with two buckets, and its store."""
    folder = tmp_path_factory.mktemp("cache")
    snapshot = make_snapshot(folder, tiny_checkpoint, shapes=(SHAPE, OTHER, SHAPE, SHAPE, OTHER))
    return ModelConfig(path=str(tiny_checkpoint)), snapshot, Store(str(folder))


@pytest.fixture
def go(world, tmp_path):
    """Train into a named folder with a short configuration, changed as asked."""
    model, snapshot, store = world

    def run(name="run", on_checkpoint=None, profile=False, **changes):
        config = TrainConfig(
            **{
                "output": str(tmp_path / name),
                "steps": 6,
                "batch_size": 4,
                "micro_batch_size": 2,
                "dtype": "float32",
                "lora": LoraConfig(rank=4),
                "optimizer": OptimizerConfig(lr=1e-2),
                "checkpoint_every": 2,
            }
            | changes
        )
        return train(model, config, snapshot, store, on_checkpoint=on_checkpoint, profile=profile)

    return run


def weights(result):
    return read_adapter(result.adapter)[0]


def curve(tmp_path, name):
    return [record["loss"] for record in read_metrics(tmp_path / name)]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Killed(Exception):
    """Stands for a process that ends without a word."""


def kill_at(step):
    def on_checkpoint(done, folder):
        if done == step:
            raise Killed

    return on_checkpoint


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_same_run_twice_gives_the_same_bits(go, tmp_path, method):
    assert same(weights(go("a", method=method)), weights(go("b", method=method)))
    assert curve(tmp_path, "a") == curve(tmp_path, "b")


def test_the_adapter_learns_and_is_live(go, world):
    model, _, _ = world
    result = go(steps=40, objective=ObjectiveConfig(text_dropout=0.0))
    assert all(tensor.abs().max() > 0 for name, tensor in weights(result).items() if "lora_B" in name)
    transformer = CosmosTransformer3DModel.from_pretrained(model.path, subfolder="transformer")
    load_adapter(transformer, result.adapter)
    assert result.samples_consumed == 160


def test_losses_fall(go, tmp_path):
    go(steps=60)
    losses = curve(tmp_path, "run")
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_a_killed_run_continues_as_if_nothing_had_happened(go, tmp_path):
    whole = go("whole")
    with pytest.raises(Killed):
        go("killed", on_checkpoint=kill_at(4))
    assert not (tmp_path / "killed" / "adapter").exists()
    result = go("killed")
    assert result.resumed_from == 4
    assert same(weights(result), weights(whole))
    assert curve(tmp_path, "killed") == curve(tmp_path, "whole")


def test_adapter_dropout_survives_a_resume(go):
    lora = LoraConfig(rank=4, dropout=0.3)
    whole = go("whole", lora=lora)
    with pytest.raises(Killed):
        go("killed", lora=lora, on_checkpoint=kill_at(2))
    torch.manual_seed(1234)
    assert same(weights(go("killed", lora=lora)), weights(whole))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_then_the_run(go, tmp_path, number):
    handler = signal.getsignal(number)

    def on_checkpoint(step, folder):
        if step == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Preempted, match="after step 3 of 6") as caught:
        go("stopped", on_checkpoint=on_checkpoint)
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is handler
    result = go("stopped")
    assert result.resumed_from == 3
    assert same(weights(result), weights(go("whole")))


def test_micro_batches_do_not_change_the_training(go, tmp_path):
    results = {size: weights(go(f"micro{size}", micro_batch_size=size)) for size in (1, 2, 4)}
    for size in (2, 4):
        assert curve(tmp_path, f"micro{size}") == pytest.approx(curve(tmp_path, "micro1"), rel=1e-5)
        assert distance(results[size], results[1]) < 1e-5


def test_recomputing_activations_does_not_change_the_training(go):
    full, none = weights(go("full", activation="full")), weights(go("none", activation="none"))
    assert distance(full, none) < 1e-5


def test_a_profile_is_a_trace_of_three_steps(go, tmp_path):
    go("run", profile=True)
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert len({event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")}) == 3


def test_speed_is_recorded_with_each_step(go, tmp_path):
    go("run")
    record = read_metrics(tmp_path / "run")[-1]
    assert record["device_seconds_per_sample"] == pytest.approx(1 / record["samples_per_second"])
    assert record["tflops_per_device"] > 0
    assert 0 <= record["data_wait_share"] <= 1


def test_a_longer_run_continues_a_finished_one(go):
    go("run", steps=4)
    longer = go("run", steps=6)
    assert longer.resumed_from == 4
    assert same(weights(longer), weights(go("whole", steps=6)))


def test_a_finished_run_does_nothing_more(go):
    first = go()
    before = weights(first)
    again = go()
    assert again.resumed_from == 6
    assert again.loss is None
    assert same(weights(again), before)


def test_fewer_steps_than_already_done_is_an_error(go):
    go(steps=6)
    with pytest.raises(UsageError, match=r"train\.steps is 4 .* step 6"):
        go(steps=4)


def test_other_settings_in_the_same_folder_are_an_error(go):
    go()
    with pytest.raises(UsageError, match=r"train\.lora\.rank \(was 4, now 8\)"):
        go(lora=LoraConfig(rank=8), steps=8)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_bfloat16_keeps_float32_adapters(go, method):
    result = go(dtype="bfloat16", method=method)
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.float32}
    assert math.isfinite(result.loss)


def test_a_loss_that_is_not_finite_names_its_step_and_sample(go, tmp_path):
    with pytest.raises(LatentlineError, match=r"step \d+: the (loss of sample [0-9a-f]{40}|gradient)"):
        go(optimizer=OptimizerConfig(lr=1e30, grad_clip=1e30))


def test_a_cache_of_another_model_is_refused_before_anything_is_written(tiny_checkpoint, tmp_path):
    snapshot = make_snapshot(tmp_path / "cache", tiny_checkpoint, projection="a" * 40)
    config = TrainConfig(output=str(tmp_path / "run"))
    with pytest.raises(StaleCacheError):
        train(ModelConfig(path=str(tiny_checkpoint)), config, snapshot, Store(str(tmp_path / "cache")))
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file_is_an_error(go, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"train\.output"):
        go("file")


def test_an_unknown_family_is_an_error(world, tmp_path):
    model, snapshot, store = world
    with pytest.raises(UsageError, match="cosmos9"):
        train(replace(model, family="cosmos9"), TrainConfig(output=str(tmp_path)), snapshot, store)


def test_records_come_every_log_interval_and_at_the_end(go, tmp_path):
    go(steps=5, track={"log_every": 2, "tensorboard": False})
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [2, 4, 5]
    assert records[0].keys() >= {"loss", "lr", "grad_norm", "seconds_per_step", "samples_per_second", "data_wait_share"}
