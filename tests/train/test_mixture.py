"""Weights and captions in training: what a position holds, on any ranks, and what a resume may not change."""

from collections import Counter

import pytest
import torch

from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.mixture import Mixture
from manifests.shards import read_tensors
from manifests.store import Store
from tests.train.caches import SHAPE, make_snapshot
from train import cosmos25
from train.config import LoraConfig, ObjectiveConfig, TrackConfig, TrainConfig
from train.loader import Loader
from train.trainer import train

CPU = torch.device("cpu")
CAPTIONS = ("long", "medium", "short")


def visits(folder, snapshot, mixture, *, steps, rank=0, world=1, **changes):
    """(sample id, inputs) of a rank by position."""
    config = TrainConfig(
        output="unused", batch_size=4, dtype="float32", objective=ObjectiveConfig(text_dropout=0), **changes
    )
    loader = Loader(snapshot, Store(str(folder)), config, cosmos25, rank=rank, world=world, device=CPU, mixture=mixture)
    found = {}
    with loader:
        for _, micro_batches in loader.steps(*steps):
            for micro in micro_batches:
                for row, (position, weight) in enumerate(zip(micro.slot.positions, micro.slot.weights, strict=True)):
                    if weight > 0:
                        inputs = {name: tensor[row] for name, tensor in micro.inputs.items()}
                        found[position] = (micro.sample_ids[row], inputs)
    return found


def same(one, two):
    return one[0] == two[0] and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def test_weights_decide_positions_whatever_the_ranks_and_the_start(tmp_path, tiny_checkpoint):
    names = ("normal",) * 6 + ("accident",) * 2
    snapshot = make_snapshot(tmp_path, tiny_checkpoint, shapes=(SHAPE,) * 8, datasets=names)
    mixture = Mixture(datasets={"normal": 0.5, "accident": 0.5})
    whole = visits(tmp_path, snapshot, mixture, steps=(0, 6))
    dataset_of = {snapshot.sample(i).sample_id: snapshot.sample(i).dataset for i in range(8)}
    for step in range(6):
        batch = [dataset_of[whole[step * 4 + i][0]] for i in range(4)]
        assert Counter(batch) == {"normal": 2, "accident": 2}
    assert len({float(inputs["noise"].sum()) for _, inputs in whole.values()}) == 24
    parts = {}
    for rank in range(3):
        parts |= visits(tmp_path, snapshot, mixture, steps=(2, 6), rank=rank, world=3, micro_batch_size=2)
    assert sorted(parts) == list(range(8, 24))
    assert all(same(parts[position], whole[position]) for position in parts)


@pytest.mark.parametrize("weights", [{}, {"test": {"long": 1.0, "medium": 1.0, "short": 6.0}}])
def test_each_visit_draws_one_of_the_captions(tmp_path, tiny_checkpoint, weights):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint, captions=CAPTIONS)
    store, mixture = Store(str(tmp_path)), Mixture(captions=weights)
    contexts = {}
    for index in range(snapshot.num_samples):
        sample = snapshot.sample(index)
        for name, place in sample.contexts.items():
            contexts[sample.sample_id, name] = read_tensors(store, place)["context"]
    whole = visits(tmp_path, snapshot, mixture, steps=(0, 30))
    drawn = Counter()
    for sample_id, inputs in whole.values():
        [name] = [name for name in CAPTIONS if torch.equal(inputs["context"], contexts[sample_id, name])]
        drawn[name] += 1
    expected = {"long": 40, "medium": 40, "short": 40} if not weights else {"long": 15, "medium": 15, "short": 90}
    assert all(abs(drawn[name] - count) < 16 for name, count in expected.items()), drawn
    again = visits(tmp_path, snapshot, mixture, steps=(10, 30), rank=1, world=2)
    assert len(again) == 40
    assert all(same(again[position], whole[position]) for position in again)


def test_several_captions_change_nothing_but_the_context(tmp_path, tiny_checkpoint):
    """The latents of a seed and its noise come from the same keys; a single caption is drawn without a draw."""
    single = make_snapshot(tmp_path, tiny_checkpoint)
    plain = visits(tmp_path, single, Mixture(), steps=(0, 3))
    weighted = visits(tmp_path, single, Mixture(captions={"else": {"long": 1.0}}), steps=(0, 3))
    assert all(same(plain[position], weighted[position]) for position in plain)


def run(folder, checkpoint, snapshot, mixture, steps):
    config = TrainConfig(
        output=str(folder / "run"),
        steps=steps,
        batch_size=2,
        dtype="float32",
        activation="none",
        checkpoint_every=1,
        lora=LoraConfig(rank=2, alpha=2),
        track=TrackConfig(tensorboard=False),
    )
    store = Store(str(folder))
    return train(ModelConfig(path=str(checkpoint)), config, snapshot, store, mixture=mixture)


def test_a_resume_refuses_other_weights_and_takes_the_same(tmp_path, tiny_checkpoint):
    names = ("a", "a", "a", "b")
    snapshot = make_snapshot(tmp_path, tiny_checkpoint, shapes=(SHAPE,) * 4, datasets=names, captions=CAPTIONS)
    captions = {"a": dict.fromkeys(CAPTIONS, 1.0)}
    mixture = Mixture(datasets={"a": 0.7, "b": 0.3}, captions=captions)
    run(tmp_path, tiny_checkpoint, snapshot, mixture, 1)
    with pytest.raises(UsageError, match=r"data\.datasets\.b\.weight \(was 0\.3, now 0\.5\)") as caught:
        run(tmp_path, tiny_checkpoint, snapshot, Mixture(datasets={"a": 0.7, "b": 0.5}, captions=captions), 2)
    assert "data.datasets.a.weight" not in str(caught.value)
    with pytest.raises(UsageError, match=r"data\.datasets\.a\.weight \(was 0\.7, now None\)"):
        run(tmp_path, tiny_checkpoint, snapshot, Mixture(captions=captions), 2)
    other = {"a": dict.fromkeys(CAPTIONS, 1.0) | {"long": 2.0}}
    with pytest.raises(UsageError, match=r"data\.datasets\.a\.captions \(was "):
        run(tmp_path, tiny_checkpoint, snapshot, Mixture(datasets=mixture.datasets, captions=other), 2)
    assert run(tmp_path, tiny_checkpoint, snapshot, mixture, 2).resumed_from == 1


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, tiny_checkpoint):
    snapshot = make_snapshot(tmp_path, tiny_checkpoint)
    with pytest.raises(UsageError, match=r"data\.datasets gives no weight"):
        run(tmp_path, tiny_checkpoint, snapshot, Mixture(datasets={"else": 1.0}), 1)
    assert not (tmp_path / "run").exists()
