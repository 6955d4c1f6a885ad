import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manifests.errors import UsageError
from train.config import TrackConfig
from train.metrics import METRICS_NAME, Meter, Metrics, check_trackers, read_metrics


def write(folder, steps, *, done=0, tensorboard=True):
    metrics = Metrics(folder, TrackConfig(tensorboard=tensorboard), done=done, settings={})
    for step in steps:
        metrics.record({"step": step, "loss": 1 / step + done})
    metrics.close()


def test_a_resumed_run_reads_as_one(tmp_path):
    write(tmp_path, range(1, 6))
    with open(tmp_path / METRICS_NAME, "a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, [4, 5], done=3)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["loss"] >= 3 for record in records] == [False, False, False, True, True]


def test_tensorboard_gets_every_number(tmp_path):
    write(tmp_path, [1, 2])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_tensorboard_can_be_off(tmp_path):
    write(tmp_path, [1], tensorboard=False)
    assert [entry.name for entry in tmp_path.iterdir()] == [METRICS_NAME]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_must_be_installed_when_asked_for():
    with pytest.raises(UsageError, match=r"train\.track\.wandb.*pip install wandb"):
        check_trackers(TrackConfig(wandb=True))


def test_the_meter_counts_from_record_to_record():
    meter = Meter()
    meter.add(samples=4, waited=0.0)
    meter.add(samples=4, waited=0.0)
    first = meter.take()
    assert first["samples_per_second"] * first["seconds_per_step"] == pytest.approx(4)
    meter.add(samples=2, waited=0.0)
    assert meter.take()["data_wait_share"] == 0.0
