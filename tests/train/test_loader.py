import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import CorruptError, LatentlineError
from manifests.store import Store
from tests.train.caches import SHAPE, make_snapshot
from train import cosmos25
from train.config import ObjectiveConfig, TrainConfig
from train.loader import Loader, plan_step

OTHER = (16, 2, 6, 4)
CPU = torch.device("cpu")


@settings(max_examples=200)
@given(
    shapes=st.lists(st.sampled_from([(1,), (2,), (3,)]), min_size=1, max_size=12),
    micro=st.integers(1, 4),
    world=st.integers(1, 5),
    first=st.integers(0, 1000),
)
def test_ranks_share_out_a_step_exactly(shapes, micro, world, first):
    plans = [plan_step(shapes, first=first, micro_batch_size=micro, rank=r, world=world) for r in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    slots = [slot for plan in plans for slot in plan]
    weights = Counter()
    for slot in slots:
        assert 1 <= len(slot.positions) <= micro
        assert len({shapes[position - first] for position in slot.positions}) == 1
        for position, weight in zip(slot.positions, slot.weights, strict=True):
            weights[position] += weight
    assert dict(weights) == pytest.approx({first + i: 1 / len(shapes) for i in range(len(shapes))})
    real = [position for slot in slots for position, w in zip(slot.positions, slot.weights, strict=True) if w > 0]
    assert len(real) == len(set(real)) == len(shapes)


def test_equal_shapes_are_dealt_in_stripes():
    plans = [plan_step([SHAPE] * 6, first=12, micro_batch_size=2, rank=r, world=2) for r in range(2)]
    assert [[slot.positions for slot in plan] for plan in plans] == [[(12, 14), (16,)], [(13, 15), (17,)]]


def run_config(**changes) -> TrainConfig:
    return TrainConfig(output="unused", **{"batch_size": 4, "micro_batch_size": 2, "dtype": "float32"} | changes)


def open_loader(folder, snapshot, config, rank=0, world=1):
    return Loader(snapshot, Store(str(folder)), config, cosmos25, rank=rank, world=world, device=CPU)


@pytest.fixture
def mixed(tmp_path, tiny_checkpoint):
    return make_snapshot(tmp_path, tiny_checkpoint, shapes=(SHAPE, OTHER, SHAPE, OTHER, SHAPE))


def visits(loader, first, last):
    """All that a rank computes with, by position."""
    found = {}
    with loader:
        for _, micro_batches in loader.steps(first, last):
            for micro_batch in micro_batches:
                for row, (position, weight) in enumerate(
                    zip(micro_batch.slot.positions, micro_batch.slot.weights, strict=True)
                ):
                    if weight > 0:
                        assert position not in found
                        found[position] = {name: tensor[row] for name, tensor in micro_batch.inputs.items()}
    return found


def test_what_a_position_holds_does_not_depend_on_ranks_or_micro_batches_or_the_start(tmp_path, mixed):
    whole = visits(open_loader(tmp_path, mixed, run_config()), 0, 5)
    assert sorted(whole) == list(range(20))
    for world, micro, first in ((2, 1, 0), (3, 4, 0), (3, 2, 2)):
        parts = {}
        for rank in range(world):
            config = run_config(micro_batch_size=micro, loader_threads=1)
            parts |= visits(open_loader(tmp_path, mixed, config, rank, world), first, 5)
        assert sorted(parts) == list(range(first * 4, 20))
        for position, inputs in parts.items():
            assert all(torch.equal(tensor, whole[position][name]) for name, tensor in inputs.items())


def test_each_epoch_visits_each_sample_once_with_new_noise(tmp_path, mixed):
    found = visits(open_loader(tmp_path, mixed, run_config()), 0, 5)
    latents = [Counter(found[epoch * 5 + i]["latents"].sum().item() for i in range(5)) for epoch in range(4)]
    assert all(len(epoch) == 5 and epoch == latents[0] for epoch in latents)
    assert len({inputs["noise"].sum().item() for inputs in found.values()}) == 20


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropped_text_is_the_null_context(tmp_path, mixed, dropout):
    config = run_config(objective=ObjectiveConfig(text_dropout=dropout))
    contexts = {
        inputs["context"].sum().item() for inputs in visits(open_loader(tmp_path, mixed, config), 0, 5).values()
    }
    assert len(contexts) == (1 if dropout else 5)


def test_an_unreadable_shard_stops_the_step_it_belongs_to(tmp_path, mixed):
    shard = next((tmp_path / "entries" / "latents").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    for index in range(mixed.num_samples):
        place = mixed.sample(index).latents
        data[place.offset + place.size - 1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        visits(open_loader(tmp_path, mixed, run_config()), 0, 100)


def test_latents_that_are_not_finite_are_named(tmp_path, tiny_checkpoint):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint, poisoned=2)
    with pytest.raises(LatentlineError, match=r"2\.mp4.*not finite"):
        visits(open_loader(tmp_path, snapshot, run_config()), 0, 3)


def test_reading_runs_ahead_but_not_without_end(tmp_path, mixed):
    class CountingStore(Store):
        reads = 0

        def read_range(self, path, offset, size):
            CountingStore.reads += 1
            return super().read_range(path, offset, size)

    config = run_config(batch_size=1, micro_batch_size=1, loader_threads=2, objective=ObjectiveConfig(text_dropout=1))
    loader = Loader(mixed, CountingStore(str(tmp_path)), config, cosmos25, rank=0, world=1, device=CPU)
    with loader:
        _, first = next(loader.steps(0, 1000))
        next(first)
        time.sleep(0.5)
        assert 3 < CountingStore.reads < 12
    assert loader.wait_seconds > 0
