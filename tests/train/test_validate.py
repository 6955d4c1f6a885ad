import dataclasses

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manifests.cache import Cache
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.snapshot import load_snapshot, write_snapshot
from manifests.store import Store
from manifests.subset import hold_out, make_subsets
from tests.train.caches import SHAPE, make_snapshot
from train import cosmos25
from train.config import ObjectiveConfig, TrainConfig, ValidationConfig
from train.loader import Loader
from train.metrics import read_metrics
from train.trainer import train
from train.validate import split

OTHER = (16, 4, 6, 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("cache")
    snapshot = make_snapshot(folder, tiny_checkpoint, shapes=(SHAPE, OTHER, *[SHAPE] * 6))
    return ModelConfig(path=str(tiny_checkpoint)), snapshot, Store(str(folder))


def go(world, output, **changes):
    settings = {"steps": 4, "batch_size": 2, "dtype": "float32", "lora": {"rank": 4}, "optimizer": {"lr": 1e-2}}
    settings |= {"validation": {"every": 2, "fraction": 0.4, "sigmas": (0.2, 0.8)}, "output": str(output)}
    train(world[0], TrainConfig(**settings | changes), *world[1:])
    return [record for record in read_metrics(output) if "validation/loss" in record]


def ids(snapshot):
    return set(snapshot.table["sample_id"].to_pylist())


def test_the_held_out_part_is_the_one_the_cache_command_splits_off(world, tmp_path, tiny_checkpoint):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint, shapes=(SHAPE,) * 8)
    make_subsets(Cache(str(tmp_path)), "train", "small", split={"val": 0.4})
    rest, held = hold_out(snapshot, 0.4)
    store = Store(str(tmp_path))
    assert held.hash == load_snapshot(store, "small-val").hash
    assert rest.hash == load_snapshot(store, "small").hash
    assert ids(rest) | ids(held) == ids(snapshot)
    assert not ids(rest) & ids(held)


def test_what_is_held_out_is_never_read_by_training(world):
    _, snapshot, store = world
    config = TrainConfig(output="unused", batch_size=4, validation=ValidationConfig(every=1, fraction=0.4))
    rest, held = split(snapshot, config.validation, store)
    loader = Loader(rest, store, config, cosmos25, rank=0, world=1, device=torch.device("cpu"))
    with loader:
        seen = {name for _, parts in loader.steps(0, 10) for part in parts for name in part.sample_ids}
    assert seen == ids(rest)
    assert ids(held)


def test_a_run_records_the_loss_on_held_out_samples(world, tmp_path):
    records = go(world, tmp_path)
    assert [record["step"] for record in records] == [0, 2, 4]
    for record in records:
        parts = [record["validation/loss_q0.2"], record["validation/loss_q0.8"]]
        assert record["validation/loss"] == pytest.approx(sum(parts) / 2)
    assert records[0]["validation/loss"] != records[2]["validation/loss"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == [0, 2, 4]


def test_it_measures_the_same_thing_in_runs_that_differ(world, tmp_path):
    """Before the first step every method is the base model; seeds, batches and text dropout do not enter."""
    first = go(world, tmp_path / "a")[0]
    other = {"objective": {"text_dropout": 1.0}, "seed": 5, "batch_size": 3, "method": "full", "micro_batch_size": 2}
    second = go(world, tmp_path / "b", **other)[0]
    names = [name for name in first if name.startswith("validation/")]
    assert len(names) == 3
    assert [second[name] for name in names] == pytest.approx([first[name] for name in names], rel=1e-6)


def test_validation_changes_no_training_and_measures_the_average(world, tmp_path):
    plain = go(world, tmp_path / "a")
    averaged = go(world, tmp_path / "b", ema={"kind": "decay", "decay": 1 - 1e-9})
    go(world, tmp_path / "c", validation={"fraction": 0.4})
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in "abc"]
    assert losses[0] == losses[1] == losses[2]
    assert averaged[2]["validation/loss"] == pytest.approx(averaged[0]["validation/loss"], rel=1e-5)
    assert plain[2]["validation/loss"] != pytest.approx(plain[0]["validation/loss"], rel=1e-5)


def test_quantiles_are_those_of_what_is_drawn():
    objective = ObjectiveConfig(shift=3.0)
    draws = sorted(cosmos25.draw(0, 0, str(i), (1, 1, 1, 1), objective).sigma for i in range(2000))
    for quantile in (0.1, 0.5, 0.9):
        assert draws[int(quantile * 2000)] == pytest.approx(cosmos25.sigma_at(quantile, objective), abs=0.03)


def test_splits_that_make_no_sense_are_refused(world, tmp_path):
    _, snapshot, store = world
    with pytest.raises(UsageError, match="one of them"):
        split(snapshot, ValidationConfig(fraction=0.5, snapshot="val"), store)
    with pytest.raises(UsageError, match=r"train\.validation\.every: nothing is held out"):
        split(snapshot, ValidationConfig(every=5), store)
    with pytest.raises(UsageError, match=r"train\.validation\.fraction: .* all or none"):
        split(snapshot, ValidationConfig(fraction=1e-9), store)
    with pytest.raises(
        UsageError, match=r"train\.validation\.snapshot 'train': .*\.mp4 is in the snapshot to train on"
    ):
        split(snapshot, ValidationConfig(snapshot="train"), store)
    rest, held = hold_out(snapshot, 0.4)
    write_snapshot(store, held.table, held._footer, "val")
    assert split(rest, ValidationConfig(snapshot="val"), store)[1].hash == held.hash


@pytest.mark.parametrize("sigmas", [(), (0.5, 0.5), (0.0,), (1.0,)])
def test_quantiles_must_be_quantiles(sigmas):
    with pytest.raises(ValueError, match="quantiles"):
        ValidationConfig(sigmas=sigmas)


def test_settings_of_validation_do_not_bind_a_resumed_run(world, tmp_path):
    go(world, tmp_path)
    records = go(world, tmp_path, steps=6, validation={"every": 3, "fraction": 0.4, "sigmas": (0.5,)})
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    assert dataclasses.asdict(ValidationConfig())["every"] == 0
